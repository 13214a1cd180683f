#!/usr/bin/env bash
# Run what needs a GPU: tests/gpu/card.sh [--tiny] [STEP...]   (CONTRIBUTING.md, "A GPU")
#   OUT          folder of the results (build/card)
#   VLLM_BUNDLE  folder of a vLLM in archives bundle-*.tar.xz, to be used in place of an installed one, and of wheels (build/gpu)
#   PYTHON       interpreter (that of .venv, or python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OUT=${OUT:-$PWD/build/card}

bundle=${VLLM_BUNDLE:-$PWD/build/gpu}
if compgen -G "$bundle/bundle-*.tar.xz" > /dev/null; then
  unpacked=${TMPDIR:-/tmp}/rudder-vllm
  # A second call on the same machine finds it.
  if [ ! -e "$unpacked/complete" ]; then
    mkdir -p "$unpacked"
    for archive in "$bundle"/bundle-*.tar.xz; do
      tar -xJf "$archive" -C "$unpacked" || python3 -m tarfile -e "$archive" "$unpacked"
    done
    # Further packages, such as the peer of the trainer.
    for wheel in "$bundle"/*.whl; do
      if [ -e "$wheel" ]; then python3 -m zipfile -e "$wheel" "$unpacked"; fi
    done
    touch "$unpacked/complete"
  fi
  . "$unpacked/bundle-env.sh"
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
fi
export PYTHONPATH=$PWD:$PWD/clients/python${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m tests.gpu.card "$@"
