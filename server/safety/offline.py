"""Check a policy against a configuration, without its model."""

from pathlib import Path

from rudder.server.config import Config
from rudder.server.engine.start import layout_of, load_bundles, registry_of
from rudder.server.program.named import load_policies
from rudder.server.safety.policy import problems_of
from rudder.server.safety.problems import Problem
from rudder.server.safety.start import with_stages
from rudder.v1 import policy_pb2


def problems_offline(policy: policy_pb2.Policy, config: Config, folder: Path) -> list[Problem]:
    """Return what is wrong with a policy whose file is in `folder`, on a server of this configuration."""
    folders = [Path(config.policies.folder)] if config.policies.folder else []
    config = with_stages(config, {path: message for each in folders for path, message in load_policies(each).items()})
    served = load_bundles(config)
    # What the width of programs' vectors is compared with.
    width = next((bundle.manifest.model.hidden_size for bundle in served.values()), 0)
    return problems_of(policy, registry_of(layout_of(config, served), width, served, config), folder)
