#!/bin/sh
# Install a pinned environment: requirements/install.sh PYTHON cpu|cuda|conformance
# `make venv` and the image (k8s/Dockerfile) both call it. Every package has its hash in STACK.txt, but for PyTorch: see torch.txt.
set -eu
python=$1 folder=$(dirname "$0") stack=$2

pip() {
    "$python" -m pip --disable-pip-version-check install --quiet "$@"
}

# Packages are pinned to a whole set that works, so pip need not resolve it.
pip --no-deps --require-hashes --requirement "$folder/$stack.txt"
# Brings what PyTorch's CUDA build needs beside it, and nothing for the CPU build.
pip --requirement "$folder/torch.txt"
