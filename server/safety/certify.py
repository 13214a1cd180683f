"""Record the evaluation of a policy, rerun it, and write the certificate."""

from collections.abc import Sequence
from pathlib import Path

from rudder.sae_models.errors import UserError
from rudder.server.config import Config
from rudder.server.engine.engine import Engine
from rudder.server.engine.start import start_engine
from rudder.server.program.named import read_policy
from rudder.server.safety import certificate as certificates
from rudder.server.safety.certificate import Case, Certificate, Evaluation, Text
from rudder.server.safety.evaluation import evaluate
from rudder.server.safety.policy import Policy, compile_policy
from rudder.server.safety.start import certificate_key, with_stages


async def certify(config: Config, path: Path, texts: Path | None, max_flips: float) -> Certificate:
    """Start an engine, certify the policy of a file on it, and stop it. `texts`: record its evaluation first.

    Raises what `start_engine` raises, PolicyInvalid, UserError.
    """
    message, key = read_policy(path), certificate_key(config)
    chosen = certificates.read_texts(texts) if texts else None
    if chosen is None:
        certificates.read_evaluation(certificates.evaluation_path(path.parent, message.name))
    engine = await start_engine(with_stages(config, {path: message}))
    try:
        policy = compile_policy(message, engine.registry, path.parent, str(path))
        if policy.rows:
            await engine.hold(policy.rows)
        if chosen is not None:
            await record(engine, policy, path.parent, chosen)
        return await rerun(engine, policy, path.parent, max_flips, key)
    finally:
        await engine.stop()


async def record(engine: Engine, policy: Policy, folder: Path, texts: Sequence[Text]) -> Evaluation:
    """Write what a policy does on texts as its evaluation. UserError: the texts do not show whether it acts."""
    acts = await evaluate(engine, policy, texts)
    cases = tuple(Case(sha256=t.sha256, text=t, expected=a) for t, a in zip(texts, acts, strict=True))
    certificates.require_exercised(cases)
    evaluation = Evaluation(
        policy=policy.name,
        version=policy.version,
        recorded=certificates.today(),
        fingerprint=certificates.fingerprint(engine, policy.message),
        cases=cases,
    )
    certificates.write_evaluation(certificates.evaluation_path(folder, policy.name), evaluation)
    return evaluation


async def rerun(
    engine: Engine, policy: Policy, folder: Path, max_flips: float, key: bytes | None = None
) -> Certificate:
    """Run a policy's evaluation again, and write its certificate, sealed with the key.

    UserError: it was recorded with another content.
    """
    path = certificates.evaluation_path(folder, policy.name)
    evaluation, digest = certificates.read_evaluation(path)
    now = certificates.fingerprint(engine, policy.message)
    hint = "record it again: rudder policy certify --record --texts FILE"
    if evaluation.fingerprint.policy != now.policy:
        raise UserError(f"{path}: STALE: it was recorded with another program, guards or bundles of the policy; {hint}")
    if not evaluation.cases:
        raise UserError(f"{path}: has no texts, so that any policy would pass; {hint}")
    acts = await evaluate(engine, policy, [case.text for case in evaluation.cases])
    certificate = certificates.sealed(
        certificates.certified(policy.name, evaluation, digest, now, acts, max_flips), key
    )
    certificates.write_certificate(folder, certificate)
    return certificate
