"""A policy file as an argument, and a policy as the text of a file."""

import argparse
from pathlib import Path

import yaml
from google.protobuf import json_format

from rudder.v1 import policy_pb2


def add_file(parser: argparse.ArgumentParser) -> None:
    """Add the path of a policy file."""
    parser.add_argument("file", type=Path, metavar="POLICY.yaml", help="file of the policy")


def written(policy: policy_pb2.Policy) -> str:
    """Return the text of a policy's file, its fields in the order of the message."""
    document = json_format.MessageToDict(policy, preserving_proto_field_name=True)
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    return text
