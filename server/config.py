"""The server's configuration: this tree is the YAML file of `rudder serve`, and each field is a command-line flag.

`rudder config example` writes it with every help text; see rudder.sae_models.settings for the rules of YAML and flags.
"""

from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from rudder.sae_models import PRETRAINED, settings
from rudder.sae_models.settings import ConfigError as ConfigError
from rudder.server.caller import NO_QUOTAS, Quotas

# What the contract and vLLM can count.
MAX_COUNT, MAX_BYTES = (1 << 31) - 1, 1 << 50
MAX_SECONDS = 1e6
NonNegative = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
Seconds = Annotated[float, Meta(ge=0, le=MAX_SECONDS)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Share = Annotated[float, Meta(gt=0, le=1)]
# Name of a claim of a JSON web token.
CLAIM = r"^[A-Za-z][A-Za-z0-9_.:/-]*$"
# A host name or an IP address.
HOST = r"^[A-Za-z0-9.:_-]+$"
BankSize = Annotated[int, Meta(ge=1, le=1 << 16)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A section of the configuration."""


class Engine(Section, frozen=True):
    """The model, and the bank of SAE rows in its forward pass."""

    model: Annotated[str, Meta(min_length=1, description="folder or Hugging Face name of the language model")] = str(
        PRETRAINED / "textbook-lm"
    )
    bundles: Annotated[
        tuple[str, ...],
        Meta(description="folders of the SAE bundles to serve; the first of a site is meant where none is named"),
    ] = (str(PRETRAINED / "textbook-lm-layers.2"),)
    sites: Annotated[
        tuple[str, ...], Meta(description="sites to hook besides those of the bundles, such as layers.3.mlp_out")
    ] = ()
    rows: Annotated[BankSize, Meta(description="row places in the bank of each site")] = 256
    slots: Annotated[BankSize, Meta(description="maximum number of running requests with a program")] = 256
    window: Annotated[int, Meta(ge=1, le=1 << 14, description="maximum window of a sequence condition, in tokens")] = 32
    sequence_sites: Annotated[
        tuple[str, ...] | None, Meta(description="sites whose gates may have a sequence condition; null: all")
    ] = None
    capture_tokens: Annotated[
        Positive | None, Meta(description="tokens per step whose residuals can be captured; null: all")
    ] = None
    bank_backend: Annotated[
        Literal["auto", "torch", "triton"],
        Meta(description="what computes the bank; auto: Triton kernels on a GPU, PyTorch operations elsewhere"),
    ] = "auto"
    max_num_seqs: Annotated[Positive, Meta(description="maximum number of sequences in a batch")] = 128
    max_model_len: Annotated[
        Annotated[int, Meta(ge=2, le=MAX_COUNT)] | None,
        Meta(description="maximum length of prompt and output together, in tokens; null: the model's own"),
    ] = None
    max_num_batched_tokens: Annotated[Positive, Meta(description="maximum number of tokens in a step")] = 2048
    kv_cache_memory_bytes: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_BYTES)] | None,
        Meta(description="size of the KV cache; null: most of a GPU's free memory"),
    ] = 1 << 30
    gpu_memory_utilization: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(description="share of a GPU's memory for model and KV cache, if kv_cache_memory_bytes is null; null: 0.9"),
    ] = None
    quantization: Annotated[
        str | None, Meta(description="quantization method of vLLM, such as fp8; null: that of the model's files")
    ] = None
    revision: Annotated[
        str | None,
        Meta(description="branch, tag or commit of a Hugging Face model; null: its default"),
    ] = None
    seed: Annotated[NonNegative, Meta(description="seed of requests that set none, and of dummy weights")] = 0
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="dtype of the model; auto: its own, but on a CPU float32 where that is faster"),
    ] = "auto"
    load_format: Annotated[Literal["auto", "dummy"], Meta(description="dummy: random weights, for benchmarks")] = "auto"
    enforce_eager: Annotated[bool, Meta(description="do not compile the model: faster start, slower generation")] = (
        False
    )
    share_anonymous_prefixes: Annotated[
        bool,
        Meta(
            description="callers that did not authenticate share one prefix cache, also without a cache_salt: faster,"
            " but times and counts of cached tokens show each of them what prompts the others have sent"
        ),
    ] = False
    start_timeout_s: Annotated[
        Seconds, Meta(description="seconds after which an engine that has not started is killed, and the start fails")
    ] = 1800.0
    stall_s: Annotated[
        float,
        Meta(
            gt=0,
            le=MAX_SECONDS,
            description="seconds in which an engine with work makes no progress before it is not ready",
        ),
    ] = 30.0
    stall_kill_s: Annotated[
        float, Meta(gt=0, le=MAX_SECONDS, description="seconds without progress after which the engine counts as dead")
    ] = 120.0
    tensor_parallel_size: Annotated[Positive, Meta(description="number of tensor-parallel devices")] = 1
    nodes: Annotated[Positive, Meta(description="machines that the tensor-parallel devices are spread over")] = 1
    node_rank: Annotated[
        NonNegative, Meta(description="number of this machine among them; 0 serves calls, the others follow it")
    ] = 0
    leader_address: Annotated[
        str, Meta(pattern=HOST, description="address of machine 0, for the others; on machine 0, its own")
    ] = "127.0.0.1"
    leader_port: Annotated[
        Annotated[int, Meta(ge=1, le=65535)], Meta(description="port of machine 0 where the devices meet")
    ] = 29501
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="device that runs the model")] = "auto"


class Programs(Section, frozen=True):
    """Programs of the operator, which clients select by name."""

    folder: Annotated[str | None, Meta(description="folder of programs, one YAML file each; null: none")] = str(
        PRETRAINED / "programs"
    )


class Policies(Section, frozen=True):
    """Policies of the operator, which bind callers whatever their requests ask for."""

    folder: Annotated[str | None, Meta(description="folder of policies, one YAML file each; null: none")] = None
    stages: Annotated[
        Annotated[int, Meta(ge=0, le=16)],
        Meta(description="policies with a program that can run in one call, at least; more, if those of the folder do"),
    ] = 0
    rows: Annotated[
        NonNegative,
        Meta(
            description="row places of each site that only policies use, so that no request stands in the way of one"
            " that is put in force while the server runs; twice what they need lets each be replaced"
        ),
    ] = 0
    reload_s: Annotated[
        Seconds, Meta(description="seconds between two looks for changed files; 0: reload on SIGHUP alone")
    ] = 0.0
    state: Annotated[
        str | None,
        Meta(
            description="file that remembers the versions of policies over restarts: none may be missing or older at"
            " the next start; null: policies.json beside the audit log, and without one none"
        ),
    ] = None
    allow_apply: Annotated[
        bool, Meta(description="PolicyService.Apply may change policies over a door that authenticates nobody")
    ] = False
    certificate_key: Annotated[
        str | None,
        Meta(
            description="file with the key that seals certificates, as `rudder audit key FILE` writes; none without its"
            " seal counts. null: they have none"
        ),
    ] = None
    allow_uncertified: Annotated[
        bool,
        Meta(description="serve policies that `rudder policy certify` has not passed with this configuration"),
    ] = False


class Audit(Section, frozen=True):
    """The audit log: one entry per call that a policy binds, and per change of a policy, in a keyed chain."""

    folder: Annotated[str | None, Meta(description="folder of the log; null: no log")] = None
    key_file: Annotated[
        str | None, Meta(description="file with the key of the chain, which `rudder audit key FILE` writes")
    ] = None
    head: Annotated[
        str | None,
        Meta(description="file of the head, better where who can write the log cannot; null: head.json in the folder"),
    ] = None
    fsync: Annotated[
        Literal["always", "interval", "never"],
        Meta(
            description="always: an answer waits until its entry is on disk; interval: a power cut may lose a second of"
            " entries; never: as many as the operating system holds back"
        ),
    ] = "interval"
    on_failure: Annotated[
        Literal["closed", "open"],
        Meta(description="where it cannot be written, closed: refuse calls that a policy binds; open: count the loss"),
    ] = "closed"
    max_bytes: Annotated[
        int, Meta(ge=1, le=MAX_BYTES, description="size of a file of the log after which the next one begins")
    ] = 64 << 20
    anchor_every: Annotated[
        Positive, Meta(description="entries after which the head is written; after a second it is in any case")
    ] = 100
    queue: Annotated[Positive, Meta(description="entries that wait to be written, or to be sent to the webhook")] = 8192
    webhook: Annotated[str | None, Meta(description="URL that the lines of the log are posted to; null: none")] = None
    webhook_secret_file: Annotated[
        str | None, Meta(description="file with the key that signs what is posted, as `rudder audit key FILE` writes")
    ] = None


class WatchedFeature(Section, frozen=True):
    """A latent whose activity over all requests is counted in Prometheus."""

    index: Annotated[NonNegative, Meta(description="index of the latent")]
    site: Annotated[str | None, Meta(description="site of the latent; null: the bundle's")] = None
    bundle: Annotated[str | None, Meta(description="bundle of the latent; null: the only bundle served")] = None


class Listen(Section, frozen=True):
    """Addresses, and how the server shuts down."""

    host: Annotated[str, Meta(min_length=1, description="address to listen on")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="port of the gRPC services; 0: any free port")] = 50051
    http_port: Annotated[
        Port | None,
        Meta(description="port of the OpenAI-compatible HTTP endpoint, at host; null: none; 0: any free port"),
    ] = None
    metrics_host: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(description="address of the Prometheus endpoint, which has neither TLS nor credentials; null: host"),
    ] = None
    metrics_port: Annotated[Port, Meta(description="port of the Prometheus endpoint; 0: any free port")] = 9464
    health_port: Annotated[
        Port | None,
        Meta(
            description="port on host of gRPC health checks alone, for probes: without TLS or credentials; 0: any free"
            " port; null: none, health is served on port"
        ),
    ] = None
    allow_plaintext: Annotated[
        bool, Meta(description="listen without TLS on an address that is not this machine alone")
    ] = False
    accept_s: Annotated[
        Seconds,
        Meta(description="seconds after SIGTERM in which calls are still accepted, until load balancers know"),
    ] = 5.0
    drain_s: Annotated[Seconds, Meta(description="seconds after that in which running requests may finish")] = 30.0

    def address(self, port: int) -> str:
        """Return `host:port` of the services, with an IPv6 host in brackets."""
        return address_of(self.host, port)

    def metrics_address(self, port: int) -> str:
        """Return `host:port` of the Prometheus endpoint."""
        return address_of(self.metrics_host or self.host, port)


def address_of(host: str, port: int) -> str:
    """Return `host:port`, with an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone. A name other than localhost may be any."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class Tls(Section, frozen=True):
    """TLS of the services. Files that change are read again; one that cannot be read leaves the last good ones."""

    certificate: Annotated[str | None, Meta(description="PEM file of the server's certificate chain; null: no TLS")] = (
        None
    )
    key: Annotated[str | None, Meta(description="PEM file of its private key")] = None
    client_ca: Annotated[
        str | None, Meta(description="PEM file of the authorities of clients, who must then have a certificate")
    ] = None


class RoleQuotas(Section, frozen=True):
    """Quotas of callers whose token or certificate names none."""

    role: Annotated[
        Literal["generate", "steer", "raw", "observe", "operate", "administer"] | None,
        Meta(description="of callers that have this role; null: of all callers"),
    ] = None
    quotas: Annotated[Quotas, Meta(description="caps a minute, but for streams and rows, which are at once")] = (
        NO_QUOTAS
    )


class Identity(Section, frozen=True):
    """Who may call. With any source of callers every call needs credentials; without one, every caller may do all."""

    tokens: Annotated[str | None, Meta(description="file of tokens, written by `rudder token create`; null: none")] = (
        None
    )
    certificates: Annotated[
        str | None, Meta(description="file of callers by the name in their client certificate; null: none")
    ] = None
    jwks: Annotated[str | None, Meta(description="JWKS file of an identity provider's public keys; null: none")] = None
    issuer: Annotated[str, Meta(description="issuer (iss) of accepted JSON web tokens")] = ""
    audience: Annotated[str, Meta(description="audience (aud) of accepted JSON web tokens")] = ""
    algorithms: Annotated[
        tuple[Literal["RS256", "ES256", "EdDSA"], ...], Meta(min_length=1, description="accepted signatures")
    ] = ("RS256", "ES256", "EdDSA")
    roles_claim: Annotated[str, Meta(pattern=CLAIM, description="claim with the caller's roles: a list, or words")] = (
        "roles"
    )
    tenant_claim: Annotated[str, Meta(pattern=CLAIM, description="claim with the caller's tenant; without it, sub")] = (
        "tenant"
    )
    quotas: Annotated[
        tuple[RoleQuotas, ...],
        Meta(description="quotas of callers whose token or certificate names none: the first entry that fits them"),
    ] = ()
    allow_anonymous: Annotated[
        bool, Meta(description="serve without credentials on an address that is not this machine alone")
    ] = False

    @property
    def required(self) -> bool:
        """Whether calls need credentials."""
        return bool(self.tokens or self.certificates or self.jwks)


class Limits(Section, frozen=True):
    """Bounds of a request. The engine's bank bounds rows and slots."""

    max_prompt_tokens: Annotated[
        Positive | None, Meta(description="tokens of a prompt; null: one less than the model's maximum length")
    ] = None
    max_prompt_chars: Annotated[Positive, Meta(description="characters of a prompt before tokenization")] = 1_000_000
    max_tokens: Annotated[
        Positive | None, Meta(description="tokens to generate; null: one less than the model's maximum length")
    ] = None
    max_messages: Annotated[Positive, Meta(description="messages of a chat")] = 1024
    max_choices: Annotated[Positive, Meta(description="choices of a request (n)")] = 16
    max_stop_strings: Annotated[NonNegative, Meta(description="stop strings, and stop token ids")] = 16
    max_stop_chars: Annotated[Positive, Meta(description="characters of a stop string")] = 256
    max_logit_bias: Annotated[NonNegative, Meta(description="entries of the logit bias")] = 1024
    max_logprobs: Annotated[NonNegative, Meta(description="alternatives reported for each token")] = 20
    max_prompt_logprobs: Annotated[NonNegative, Meta(description="alternatives reported for each prompt token")] = 20
    max_bad_words: Annotated[NonNegative, Meta(description="words that an output must not contain")] = 64
    max_allowed_token_ids: Annotated[NonNegative, Meta(description="token ids to which an output is restricted")] = 1024
    max_structured_chars: Annotated[
        Positive, Meta(description="characters of a JSON schema, a regular expression, a grammar or the choices")
    ] = 4096
    max_structured_choices: Annotated[Positive, Meta(description="choices of a structured output")] = 256
    max_name_chars: Annotated[Positive, Meta(description="characters of a name: program, vector, probe, bundle")] = 128
    max_edits: Annotated[Positive, Meta(description="edits and triggers of a program")] = 256
    max_reported_features: Annotated[NonNegative, Meta(description="features named in a report")] = 256
    max_top_k: Annotated[NonNegative, Meta(description="strongest latents reported for each token")] = 64
    max_salt_chars: Annotated[NonNegative, Meta(description="characters of a cache salt")] = 128
    max_page_size: Annotated[Positive, Meta(description="features in a page of a list or search")] = 1000
    max_query_chars: Annotated[Positive, Meta(description="characters of a search query")] = 1000
    queue: Annotated[NonNegative, Meta(description="choices that wait for the bank or the engine")] = 1024
    max_wait_s: Annotated[float, Meta(gt=0, description="seconds that a choice may wait for the bank")] = 60.0
    request_share: Annotated[
        Share, Meta(description="share of a site's unreserved row places that one request may hold")
    ] = 0.75
    caller_share: Annotated[
        Share, Meta(description="share of slots, row places and captures that a caller may take while another waits")
    ] = 0.5
    max_pending_bytes: Annotated[
        int, Meta(ge=1024, le=MAX_COUNT, description="bytes of the request messages of all calls in progress together")
    ] = 512 << 20
    max_message_bytes: Annotated[int, Meta(ge=1024, le=MAX_COUNT, description="bytes of a request message")] = 4 << 20
    max_reply_bytes: Annotated[int, Meta(ge=1024, le=MAX_COUNT, description="bytes of a response message")] = 16 << 20
    write_timeout_s: Annotated[
        float, Meta(ge=0.001, le=MAX_SECONDS, description="seconds that a client may leave a message unread")
    ] = 30.0


class Prompt(Section, frozen=True):
    """How prompts become tokens."""

    special_tokens: Annotated[
        Literal["text", "refuse"],
        Meta(description="special tokens that a prompt's text or messages spell: encode them as text, or refuse"),
    ] = "text"


class Stream(Section, frozen=True):
    """How generated tokens are combined into messages."""

    message_budget_per_s: Annotated[
        Annotated[float, Meta(ge=1, le=1e9)] | None,
        Meta(description="messages per second over all streams; above it tokens are combined; null: 2000 a core"),
    ] = None
    max_flush_ms: Annotated[
        float, Meta(ge=0, le=1e9, description="maximum time that a token waits to be combined with the next")
    ] = 50.0


class Logs(Section, frozen=True):
    """The log on standard error: one line per request, and start, drain and faults of the server."""

    format: Annotated[Literal["text", "json"], Meta(description="readable lines, or one JSON object per line")] = "text"
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="minimum level; VLLM_LOGGING_LEVEL sets that of vLLM's own log"),
    ] = "info"


Bounds = Annotated[tuple[Annotated[float, Meta(gt=0, le=MAX_SECONDS)], ...], Meta(min_length=1, max_length=64)]


class Monitoring(Section, frozen=True):
    """Metrics and traces."""

    max_series: Annotated[
        int, Meta(ge=100, le=100_000, description="series of one metric; what is beyond is counted under `_other`")
    ] = 2000
    latency_bounds_s: Annotated[
        Bounds | None,
        Meta(
            description="bounds of the buckets of latencies, vLLM's too; null: 1 ms to 60 s. Alerts need 2.5 among them"
        ),
    ] = None
    token_bounds_s: Annotated[
        Bounds | None,
        Meta(description="bounds of the buckets of times between tokens, vLLM's too; null: 0.5 ms to 60 s"),
    ] = None
    traces_endpoint: Annotated[
        Annotated[str, Meta(pattern="^http://[^/]+$")] | None,
        Meta(
            description="OpenTelemetry collector that takes OTLP over gRPC, such as http://localhost:4317; null: none"
        ),
    ] = None
    traces_share: Annotated[
        Share, Meta(description="share of the calls that are traced, of those whose clients made no choice")
    ] = 1.0


class Config(Section, frozen=True):
    """Configuration of a server. The defaults serve the shipped model and bundle."""

    engine: Engine = Engine()
    programs: Programs = Programs()
    policies: Policies = Policies()
    audit: Audit = Audit()
    watch: Annotated[
        tuple[WatchedFeature, ...],
        Meta(max_length=256, description="latents counted in Prometheus over all requests"),
    ] = ()
    listen: Listen = Listen()
    tls: Tls = Tls()
    identity: Identity = Identity()
    limits: Limits = Limits()
    prompt: Prompt = Prompt()
    stream: Stream = Stream()
    logs: Logs = Logs()
    monitoring: Monitoring = Monitoring()
    allow_unsafe: Annotated[
        tuple[str, ...], Meta(description="what the server starts in spite of: names that a refused start has given")
    ] = ()


def load(path: Path | None = None, overrides: Mapping[str, str] | None = None) -> Config:
    """Read the configuration of a YAML file and apply overrides (dotted field: text). ConfigError: names the field."""
    return settings.load(Config, path, overrides)


def show(config: Config) -> str:
    """Write the configuration as a YAML file that `load` reads back."""
    return settings.dump(config)
