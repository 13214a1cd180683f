"""`rudder model`: the real package, downloaded and converted once; then it loads without a network."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rudder.server.models.known import KNOWN, get, state_of
from rudder.server.models.package import DownloadError

pytestmark = [pytest.mark.e2e, pytest.mark.network]
NAME = "smollm2-135m-instruct"
# As published with HuggingFaceTB/SmolLM2-135M-Instruct.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The model in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        try:
            folder = get(NAME)
        except DownloadError as error:
            pytest.skip(str(error))
        yield folder


def test_result_is_the_pinned_one(folder: Path) -> None:
    assert state_of(KNOWN[NAME]) == "complete"
    assert (folder / "model.safetensors").stat().st_size == KNOWN[NAME].size


@pytest.mark.usefixtures("folder")
def test_model_that_is_there_needs_no_network(folder: Path) -> None:
    environment = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PATH": ""}
    command = [sys.executable, "-m", "rudder.server", "model", "get", NAME]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{folder}\n", "")


def test_chat_template_is_the_published_one(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    messages = [{"role": "user", "content": "What causes tuberculosis?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        "<|im_start|>user\nWhat causes tuberculosis?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_special_tokens_are_the_published_ones(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "im_start", "im_end")] == [0, 1, 2]
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert (ids, len(tokenizer)) == ((1, 2, 2, 0), 49152)
    assert {number: token.special for number, token in tokenizer.added_tokens_decoder.items()} == dict.fromkeys(
        range(17), True
    )
    assert tokenizer.tokenize("What causes the flu in 2024?") == [
        *("What", "Ġcauses", "Ġthe", "Ġflu", "Ġin", "Ġ"), *"2024", "?",
    ]  # fmt: skip
