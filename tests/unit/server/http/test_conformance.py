"""llm-comply, which holds answers against the published specifications of OpenAI's chats and of Open Responses."""

import asyncio
import json
import sys
from typing import Any

import pytest

from rudder.server.engine.call import FinishReason
from tests.unit.server.http.rig import Rig

# What is not offered, and is refused by name: tools and images. (Compaction is only warned about.)
NOT_OFFERED = {
    "openai-chat": {"chat-tool-calling", "chat-image-input"},
    "open-responses": {"tool-calling", "image-input"},
}


@pytest.mark.parametrize("form", sorted(NOT_OFFERED))
async def test_answers_conform_to_the_specification(form: str) -> None:
    async with Rig() as rig:
        rig.engine.finish_reason = FinishReason.STOP
        target = ["--base-url", f"{rig.address}/v1", "--api-key", "none", "--model", "m", "--format", form, "--json"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "from llm_comply.cli import main; main()", *target, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
    results: dict[str, Any] = {result["id"]: result for result in json.loads(output)["results"]}
    assert len(results) >= 9
    failed = {name for name, result in results.items() if result["status"] not in ("passed", "skipped")}
    assert failed == NOT_OFFERED[form], output.decode()
