"""Log lines in both formats, and a configuration that leaves nothing behind."""

import json
import logging
import os
import subprocess
import sys
from typing import Any

import pytest

from rudder.server.monitoring.logs import JsonFormatter, TextFormatter, configuration, fields

SCRIPT = """
import logging, os
from rudder.server.monitoring import logs
with logs.configured({form!r}, "info"):
    logging.getLogger("rudder.server.x").info("hello", extra=logs.fields(n=1))
    logging.getLogger("rudder.server.x").debug("not logged")
    logging.getLogger("other").info("not logged")
    logging.getLogger("vllm.engine").info("from vllm")
    print(os.environ["VLLM_LOGGING_CONFIG_PATH"], os.path.exists(os.environ["VLLM_LOGGING_CONFIG_PATH"]))
print("VLLM_LOGGING_CONFIG_PATH" in os.environ)
"""


def record(message: str, **values: Any) -> logging.LogRecord:
    result = logging.LogRecord("rudder.access", logging.INFO, __file__, 1, message, (), None)
    result.__dict__.update(fields(**values), created=1_700_000_000.25)
    return result


def test_text_line() -> None:
    line = TextFormatter().format(record("done", request_id="ab", who="a b", n=3, seconds=0.25, sites=["x", "y"]))
    expected = 'INFO rudder.access: done request_id=ab who="a b" n=3 seconds=0.25 sites=x,y'
    assert line == f"2023-11-14T22:13:20.250Z {expected}"


@pytest.mark.parametrize("value", ['a"b', "a=b", "a\nb", "é", "\x1b[31m"])
def test_text_values_cannot_forge_fields_or_lines(value: str) -> None:
    line = TextFormatter().format(record("done", value=value))
    assert line.endswith(f"value={json.dumps(value)}")
    assert line.isprintable()


def test_json_line() -> None:
    line = JsonFormatter().format(record("two\nlines", request_id="ab", n=3, empty="", none=None, level="forged"))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "logger": "rudder.access",
        "process": "MainProcess",
        "message": "two\nlines",
        "request_id": "ab",
        "n": 3,
    }


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_traceback_is_logged(formatter: logging.Formatter) -> None:
    failed = record("failed")
    try:
        raise ValueError("cause")
    except ValueError:
        failed.exc_info = sys.exc_info()
    assert "ValueError: cause" in formatter.format(failed)


@pytest.mark.parametrize("form", ["text", "json"])
def test_rudder_and_vllm_log_once_in_one_format(form: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(form=form)], capture_output=True, text=True, check=True, env=env
    )
    lines = run.stderr.splitlines()
    assert len(lines) == 2
    if form == "json":
        assert [json.loads(line)["message"] for line in lines] == ["hello", "from vllm"]
    else:
        assert lines[0].endswith("INFO rudder.server.x: hello n=1")
    path, exists, after = run.stdout.split()
    assert (exists, after) == ("True", "False")
    assert not os.path.exists(path)  # noqa: PTH110


def test_operator_s_own_vllm_configuration_stays() -> None:
    env = os.environ | {"VLLM_LOGGING_CONFIG_PATH": "/own.json"}
    code = (
        "import os\nfrom rudder.server.monitoring import logs\n"
        "with logs.configured('json', 'info'): print(os.environ['VLLM_LOGGING_CONFIG_PATH'])\n"
        "print(os.environ['VLLM_LOGGING_CONFIG_PATH'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert run.stdout.split() == ["/own.json", "/own.json"]


def test_configuration_is_json() -> None:
    assert json.loads(json.dumps(configuration("json", "debug")))["loggers"]["rudder"] == {"level": "DEBUG"}
