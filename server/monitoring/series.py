"""Every Prometheus series of a server, declared once: type, help, labels, and what bounds each label.

`Metrics` fills them, `table` writes them into docs/monitoring.md, and the tests hold dashboards and rules to them.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]
# Which bounds of the configuration the buckets of a histogram have.
Buckets = Literal["latency", "token"]
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}


class Label(NamedTuple):
    """A label. `bound`: what bounds its values; `known`: values that its series have from the start, at 0."""

    name: str
    bound: str
    known: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Series:
    """A metric family. A counter's name is without `_total`.

    `collected`: a collector computes it at each scrape; else `Metrics` counts it in a family of its own.
    """

    noun: str
    name: str
    kind: Kind
    help: str
    labels: tuple[Label, ...] = ()
    buckets: Buckets = "latency"
    collected: bool = False

    @property
    def exported(self) -> tuple[str, ...]:
        """Names of its samples."""
        return tuple(self.name + suffix for suffix in SUFFIXES[self.kind])

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of its labels."""
        return tuple(label.name for label in self.labels)


METHOD = Label("method", "methods of the contract")
CALLER = Label("caller", "ids of callers; those beyond the cap are `_other`")
POLICY = Label("policy", "policies in force")
RULE = Label("rule", "guards of a policy")
SITE = Label("site", "hooked sites")
ORIGIN = Label("origin", "`request`, `policy`, `shadow`")
FEATURE = (Label("bundle", "bundles served"), SITE, Label("feature", "latents that `watch` names"))
STATE = Label("state", "`used`, `free`")

CALLS = (
    REQUESTS := Series(
        "Calls",
        "rudder_requests",
        "counter",
        "Calls ended, by outcome: OK, CANCELLED, DEADLINE_EXCEEDED, or the reason of the error.",
        (METHOD, Label("outcome", "outcomes of calls")),
    ),
    RETRIED := Series(
        "Calls",
        "rudder_retried_requests",
        "counter",
        "Calls that a client's gRPC library made again by itself.",
        (METHOD,),
    ),
    REQUEST_SECONDS := Series("Calls", "rudder_request_seconds", "histogram", "Time from call to end.", (METHOD,)),
    QUEUE_SECONDS := Series(
        "Calls", "rudder_request_queue_seconds", "histogram", "Time that a choice waited for room in the bank."
    ),
    CALLER_REQUESTS := Series("Calls", "rudder_caller_requests", "counter", "Calls ended, by caller.", (CALLER,)),
    CALLER_TOKENS := Series(
        "Calls",
        "rudder_caller_tokens",
        "counter",
        "Tokens of ended calls, by caller. Cached ones are among those of the prompt.",
        (CALLER, Label("kind", "`prompt`, `cached`, `generated`")),
    ),
    PENDING_BYTES := Series(
        "Calls", "rudder_pending_request_bytes", "gauge", "Bytes of the request messages of calls in progress."
    ),
)
STREAMS = (
    FIRST_TOKEN_SECONDS := Series(
        "Streams", "rudder_time_to_first_token_seconds", "histogram", "Time from call to the first token of a choice."
    ),
    INTER_TOKEN_SECONDS := Series(
        "Streams",
        "rudder_inter_token_seconds",
        "histogram",
        "Time between tokens of a choice.",
        buckets="token",
    ),
    MESSAGES := Series("Streams", "rudder_stream_messages", "counter", "Messages of token streams."),
    TOKENS := Series(
        "Streams", "rudder_stream_tokens", "counter", "Tokens of token streams; per message: how many share one."
    ),
)
EDITS = (
    EDITED_TOKENS := Series(
        "Edits",
        "rudder_edits_applied_tokens",
        "counter",
        "Tokens that an edit touched; of origin shadow: that it would have touched.",
        (SITE, Label("operation", "operations of edits"), ORIGIN, POLICY),
    ),
    REJECTED_EDITS := Series(
        "Edits",
        "rudder_edits_rejected",
        "counter",
        "Edits of a token that were rejected, since x would not have stayed finite.",
        (SITE, ORIGIN, POLICY),
    ),
)
SAFETY = (
    POLICIES := Series(
        "Policies and guards",
        "rudder_policy",
        "gauge",
        "Always 1; a policy in force.",
        (POLICY, Label("version", "versions in force"), Label("mode", "`enforce`, `shadow`")),
    ),
    POLICY_CHANGES := Series(
        "Policies and guards",
        "rudder_policy_changes",
        "counter",
        "Policies applied, unchanged, removed or refused.",
        (Label("outcome", "outcomes of changes", ("applied", "refused", "removed", "unchanged")),),
    ),
    VERDICTS := Series(
        "Policies and guards",
        "rudder_guard_verdicts",
        "counter",
        "Choices in which a guard held; enforced, or in shadow mode.",
        (POLICY, RULE, Label("action", "actions of guards"), Label("mode", "`enforce`, `shadow`")),
    ),
    SHADOW_REFUSALS := Series(
        "Policies and guards",
        "rudder_policy_shadow_refusals",
        "counter",
        "Calls that a policy in shadow mode would have refused before they ran.",
        (POLICY, Label("reason", "reasons of errors")),
    ),
    VERDICTS_LOST := Series(
        "Policies and guards", "rudder_verdicts_lost", "counter", "Calls that ended since a verdict was lost."
    ),
    HOLD_BACK_SECONDS := Series(
        "Policies and guards",
        "rudder_hold_back_seconds",
        "histogram",
        "Time that a token waited for its verdict.",
        buckets="token",
    ),
    GUARD_LEVEL := Series(
        "Policies and guards",
        "rudder_guard_level",
        "gauge",
        "Level that a guard's statistic must exceed.",
        (POLICY, RULE),
        collected=True,
    ),
    BENIGN_SCORE := Series(
        "Policies and guards",
        "rudder_guard_benign_score",
        "gauge",
        "Quantiles of the largest statistic of a choice, over the last 10,000 in which the guard did not hold.",
        (POLICY, RULE, Label("quantile", "`0.5`, `0.99`, `0.999`")),
        collected=True,
    ),
)
AUDIT = (
    AUDIT_RECORDS := Series(
        "Audit log",
        "rudder_audit_records",
        "counter",
        "Entries of the audit log, by outcome.",
        (Label("outcome", "`written`, `lost`", ("written", "lost")),),
    ),
    WEBHOOK_RECORDS := Series(
        "Audit log",
        "rudder_audit_webhook_records",
        "counter",
        "Entries for the audit webhook, by outcome.",
        (Label("outcome", "`sent`, `dropped`", ("sent", "dropped")),),
    ),
    AUDIT_FAILING := Series("Audit log", "rudder_audit_failing", "gauge", "1 while the audit log cannot be written."),
)
FEATURES = (
    ACTIVE_TOKENS := Series(
        "Watched features",
        "rudder_feature_active_tokens",
        "counter",
        "Tokens on which the feature was active.",
        FEATURE,
        collected=True,
    ),
    EVALUATED_TOKENS := Series(
        "Watched features",
        "rudder_feature_tokens",
        "counter",
        "Tokens on which the feature was evaluated.",
        FEATURE,
        collected=True,
    ),
    ACTIVATION_SUM := Series(
        "Watched features",
        "rudder_feature_activation_sum",
        "counter",
        "Sum of its activations.",
        FEATURE,
        collected=True,
    ),
    ACTIVATION_MAX := Series(
        "Watched features",
        "rudder_feature_activation_max",
        "gauge",
        "Largest activation since the start.",
        FEATURE,
        collected=True,
    ),
    FEATURE_INFO := Series(
        "Watched features",
        "rudder_feature_info",
        "gauge",
        "Always 1; carries the feature's label. Join it, since labels improve and series stay.",
        (*FEATURE, Label("label", "one per feature, at most 80 characters")),
        collected=True,
    ),
)
ENGINE = (
    SATURATION := Series(
        "Bank and queue",
        "rudder_saturation",
        "gauge",
        "The largest share in use, 0 to 1: of the batch, the queue, the slots, and each site's row places that no"
        " policy holds. Scale on it.",
        collected=True,
    ),
    INFLIGHT := Series(
        "Bank and queue", "rudder_inflight_choices", "gauge", "Choices that the engine is running.", collected=True
    ),
    QUEUE := Series(
        "Bank and queue",
        "rudder_queue_requests",
        "gauge",
        "Choices that wait for the bank or for the engine.",
        collected=True,
    ),
    BANK_ROWS := Series(
        "Bank and queue",
        "rudder_bank_rows",
        "gauge",
        "Row places of a site's bank.",
        (SITE, STATE),
        collected=True,
    ),
    BANK_SLOTS := Series(
        "Bank and queue",
        "rudder_bank_slots",
        "gauge",
        "Slots for requests with a program.",
        (STATE,),
        collected=True,
    ),
    TELEMETRY_SECONDS := Series(
        "Bank and queue",
        "rudder_telemetry_wait_seconds",
        "histogram",
        "Time that an output of the engine waited for the worker's report on it.",
        buckets="token",
    ),
    STALLED := Series(
        "Bank and queue", "rudder_engine_stalled", "gauge", "1 while the engine has work and makes no progress."
    ),
    TELEMETRY_LOST := Series(
        "Bank and queue",
        "rudder_telemetry_lost",
        "counter",
        "Losses of the worker's reports; after one the server stops.",
    ),
)
SERVER = (
    UNSAFE := Series(
        "Server",
        "rudder_unsafe",
        "gauge",
        "1 for each entry of allow_unsafe that the server needs.",
        (Label("what", "names of `allow_unsafe`"),),
    ),
    READY := Series("Server", "rudder_ready", "gauge", "1 while health checks say SERVING."),
    BUILD_INFO := Series(
        "Server",
        "rudder_build_info",
        "gauge",
        "Always 1; carries the versions and the model.",
        (Label("version", "one"), Label("vllm", "one"), Label("model", "one")),
    ),
    SELF_TEST_FAILURES := Series(
        "Server", "rudder_selftest_failures", "counter", "Self-tests that a site's bank did not pass."
    ),
    RELOAD_FAILURES := Series(
        "Server",
        "rudder_reload_failures",
        "counter",
        "Changed files that are not in force, since they cannot be read.",
        (
            Label(
                "what",
                "fields of the configuration that name a file",
                ("tls.certificate", "identity.tokens", "identity.certificates", "identity.jwks"),
            ),
        ),
    ),
    CERTIFICATE_EXPIRY := Series(
        "Server",
        "rudder_tls_certificate_expiry_timestamp_seconds",
        "gauge",
        "When the server's certificate expires, in Unix time; without TLS there is none.",
    ),
    SERIES_LIMIT_HITS := Series(
        "Server",
        "rudder_series_limit_hits",
        "counter",
        "Observations that went to `_other`, since the family has as many series as it may.",
        (Label("family", "the families of this table"),),
    ),
)
TABLE: tuple[Series, ...] = (*CALLS, *STREAMS, *EDITS, *SAFETY, *AUDIT, *FEATURES, *ENGINE, *SERVER)
