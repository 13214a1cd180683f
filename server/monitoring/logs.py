"""Logs: readable lines or one JSON object a line, the same for Rudder and for vLLM, in every process of a server.

A statement passes its values with `extra=fields(...)`: `text` appends them as `name=value`, `json` makes them members.
"""

import json
import logging
import logging.config
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]
# vLLM reads its logging configuration from the file that this variable names, in the engine process too.
VLLM_CONFIG_PATH = "VLLM_LOGGING_CONFIG_PATH"
BARE_VALUE = re.compile(r"[\x21\x23-\x3c\x3e-\x7e]+")


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """Return `extra` for a logging call; empty strings and None are left out."""
    return {"fields": {name: value for name, value in values.items() if value is not None and value != ""}}


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO rudder.server.serve: serving grpc=127.0.0.1:50051`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line; a traceback follows on lines of its own."""
        values = "".join(f" {name}={quoted(value)}" for name, value in record_fields(record).items())
        process = "" if record.processName == "MainProcess" else f" [{record.processName}]"
        line = f"{timestamp(record)} {record.levelname}{process} {record.name}: {record.getMessage()}{values}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `process`, `message`, the fields, and a traceback's text."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line. A field never replaces a member of the record itself."""
        values = {
            "time": timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.processName,
            "message": record.getMessage(),
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps({**values, **record_fields(record), **values}, default=str, ensure_ascii=False)


def record_fields(record: logging.LogRecord) -> Mapping[str, Any]:
    """Return the values that the statement passed with `fields`."""
    values: Mapping[str, Any] = getattr(record, "fields", {})
    return values


def timestamp(record: logging.LogRecord) -> str:
    """Return the record's time in UTC, RFC 3339 with milliseconds."""
    time = datetime.fromtimestamp(record.created, UTC)
    return f"{time:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1000:03}Z"


def quoted(value: Any) -> str:
    """Return a value as `name=value` shows it: in JSON's quotes unless it is one bare word."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if BARE_VALUE.fullmatch(text) else json.dumps(text)


def configuration(form: Format, level: Level) -> dict[str, Any]:
    """Return the `logging.config` dictionary: one handler on stderr, Rudder at `level`, other libraries at WARNING.

    vLLM keeps its own level, VLLM_LOGGING_LEVEL.
    """
    formatter = {"text": "TextFormatter", "json": "JsonFormatter"}[form]
    vllm_level = os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper()
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {form: {"()": f"{__name__}.{formatter}"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": form, "stream": "ext://sys.stderr"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        # vLLM's own default handler would print a second line.
        "loggers": {
            "rudder": {"level": level.upper()},
            "vllm": {"handlers": ["stderr"], "level": vllm_level, "propagate": False},
        },
    }


@contextmanager
def configured(form: Format, level: Level) -> Iterator[None]:
    """Configure logging of this process, and of those that vLLM starts within the context.

    Where an operator configures vLLM's logging himself, by VLLM_LOGGING_CONFIG_PATH or VLLM_CONFIGURE_LOGGING=0, his
    configuration stays in force for vLLM's loggers and for the engine process.
    """
    config = configuration(form, level)
    if VLLM_CONFIG_PATH in os.environ or os.environ.get("VLLM_CONFIGURE_LOGGING") == "0":
        del config["loggers"]["vllm"]
        logging.config.dictConfig(config)
        yield
        return
    logging.config.dictConfig(config)
    with tempfile.TemporaryDirectory(prefix="rudder-logs-") as folder:
        path = Path(folder) / "logging.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        os.environ[VLLM_CONFIG_PATH] = str(path)
        try:
            yield
        finally:
            del os.environ[VLLM_CONFIG_PATH]
