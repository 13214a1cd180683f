import { isIP } from "node:net";
import type { SecureClientSessionOptions } from "node:http2";
import { createClient } from "@connectrpc/connect";
import type { Client as Stub, Interceptor, Transport } from "@connectrpc/connect";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";
import { FeatureService, ModelService } from "./gen/rudder/v1/catalogue_pb.js";
import type { FeatureDetail, FeatureSummary, ModelServiceGetResponse, NamedProgram } from "./gen/rudder/v1/catalogue_pb.js";
import { FinishReason, InferenceService } from "./gen/rudder/v1/inference_pb.js";
import type {
  Choice,
  ChoiceDelta,
  CompleteResponse,
  FeatureColumns,
  FeatureInfo,
  InspectResponse,
  TokenizeResponse,
} from "./gen/rudder/v1/inference_pb.js";
import { PolicyService } from "./gen/rudder/v1/policy_pb.js";
import type { ExplainResponse, PolicySummary } from "./gen/rudder/v1/policy_pb.js";
import { RudderError, translated } from "./errors.js";
import { commonFields, promptMessage, samplingMessage } from "./requests.js";
import type { CallOptions, GenerateOptions, Prompt } from "./requests.js";

const PAGE_SIZE = 1000;

export interface ClientOptions {
  /** Given by the server's operator. Without TLS it is sent to this machine alone. */
  token?: string;
  /** TLS: true, or options of Node's, such as `ca`, `cert` and `key`. */
  tls?: boolean | SecureClientSessionOptions;
  /** Default deadline of a call. */
  timeoutMs?: number;
  /** Sent with every call. */
  headers?: Record<string, string>;
}

/** A latent that was active at a token, by the name that the stream gave it. */
export interface Activation {
  position: number;
  feature: FeatureInfo;
  value: number;
}

/** What a message of a stream adds to one choice. */
export interface Chunk {
  requestId: string;
  index: number;
  text: string;
  tokenIds: number[];
  activations: Activation[];
  /** With the last chunk of a choice: why it ended, in lower case; what ran is in `message.attestation`. */
  finishReason: string | undefined;
  /** The operator's text, where a policy ended the choice; it is no part of `text`. */
  refusal: string | undefined;
  message: ChoiceDelta;
}

/** Activations as columns become entries with the names of their features. */
export function activationsOf(columns: FeatureColumns | undefined, features: FeatureInfo[]): Activation[] {
  return (columns?.positions ?? []).map((position, i) => ({
    position,
    feature: features[columns!.features[i]!]!,
    value: columns!.activations[i]!,
  }));
}

/** Returns why a choice ended, in lower case; undefined while it has not. */
export function finishReasonOf(choice: Choice | ChoiceDelta): string | undefined {
  return choice.finishReason ? FinishReason[choice.finishReason].toLowerCase() : undefined;
}

/** A connection to a server. */
export class Client {
  private readonly session: Http2SessionManager;
  private readonly inference: Stub<typeof InferenceService>;
  private readonly catalogue: Stub<typeof FeatureService>;
  private readonly models: Stub<typeof ModelService>;
  private readonly policyService: Stub<typeof PolicyService>;

  constructor(address = "localhost:50051", options: ClientOptions = {}) {
    const { tls = false, token = "", headers = {}, timeoutMs } = options;
    if (token && !tls && !isLocal(address)) {
      throw new TypeError(`token: ${address} is another machine: set tls`);
    }
    const baseUrl = `${tls ? "https" : "http"}://${address}`;
    const own = token ? { ...headers, authorization: `Bearer ${token}` } : headers;
    const settings = typeof tls === "object" ? tls : undefined;
    this.session = new Http2SessionManager(baseUrl, { pingIntervalMs: 60_000 }, settings);
    const transport: Transport = createGrpcTransport({
      baseUrl,
      sessionManager: this.session,
      interceptors: [withHeaders(own)],
      readMaxBytes: 64 << 20,
      ...(timeoutMs === undefined ? {} : { defaultTimeoutMs: timeoutMs }),
    });
    this.inference = createClient(InferenceService, transport);
    this.catalogue = createClient(FeatureService, transport);
    this.models = createClient(ModelService, transport);
    this.policyService = createClient(PolicyService, transport);
  }

  /** Closes the connection and ends its running calls. */
  close(): void {
    this.session.abort();
  }

  /** Generates, and yields chunks as they come. Leaving the loop ends the call in the engine. */
  async *generate(prompt: Prompt, options: GenerateOptions = {}): AsyncGenerator<Chunk> {
    const request = {
      ...commonFields(prompt, options),
      sampling: samplingMessage(options),
      streamInterval: options.streamInterval ?? 0,
    };
    const stopped = new AbortController();
    const signal = options.signal ? AbortSignal.any([options.signal, stopped.signal]) : stopped.signal;
    const features: FeatureInfo[] = [];
    let requestId = "";
    const stream = this.inference.generate(request, { ...callOptions(options), signal })[Symbol.asyncIterator]();
    try {
      for (;;) {
        const { done, value: message } = await translated(stream.next());
        if (done) {
          return;
        }
        requestId ||= message.requestId;
        features.push(...message.features);
        for (const delta of message.choices) {
          yield chunkOf(delta, requestId, features);
        }
      }
    } finally {
      stopped.abort();
      // The stream lets go of its deadline's timer, which would keep the process alive, once it is read again.
      await stream.next().catch(() => undefined);
    }
  }

  /** Generates, and returns when all choices are complete. */
  async complete(prompt: Prompt, options: GenerateOptions = {}): Promise<CompleteResponse> {
    const request = { ...commonFields(prompt, options), sampling: samplingMessage(options) };
    return translated(this.inference.complete(request, callOptions(options)));
  }

  /** Returns the features of a text; by default the five strongest of each token. */
  async inspect(prompt: Prompt, options: CallOptions = {}): Promise<InspectResponse> {
    const request = commonFields(prompt, { report: { topK: 5 }, ...options });
    return translated(this.inference.inspect(request, callOptions(options)));
  }

  /** Returns the tokens of a prompt as `generate` would read it. */
  async tokenize(prompt: Prompt): Promise<TokenizeResponse> {
    return translated(this.inference.tokenize({ prompt: promptMessage(prompt) }));
  }

  /** Returns one latent: label, frequency, strongest tokens and contexts. */
  async feature(index: number, bundle = ""): Promise<FeatureDetail> {
    return (await translated(this.catalogue.get({ index, bundle }))).feature!;
  }

  /** Lists every latent of a bundle, by index. */
  async *features(bundle = ""): AsyncGenerator<FeatureSummary> {
    let pageToken = "";
    do {
      const page = await translated(this.catalogue.list({ bundle, pageToken, pageSize: PAGE_SIZE }));
      yield* page.features;
      pageToken = page.nextPageToken;
    } while (pageToken);
  }

  /** Searches latents by words of their label, or by its meaning; best match first. */
  async search(
    query: string,
    options: { bundle?: string; limit?: number; byMeaning?: boolean; forSteering?: boolean } = {},
  ): Promise<FeatureSummary[]> {
    return (await translated(this.catalogue.search({ query, limit: 20, ...options }))).features;
  }

  /** Returns the served model, its bundles and the limits of a request. */
  async model(): Promise<ModelServiceGetResponse> {
    return translated(this.models.get({}));
  }

  /** Lists the operator's programs, which `steer` accepts by name. */
  async programs(): Promise<NamedProgram[]> {
    return (await translated(this.models.listPrograms({}))).programs;
  }

  /** Lists the policies in force. */
  async policies(): Promise<PolicySummary[]> {
    return (await translated(this.policyService.list({}))).policies;
  }

  /** Returns the policies that bind this caller, and in sentences what they lock and forbid. */
  async explain(): Promise<ExplainResponse> {
    return translated(this.policyService.explain({}));
  }

  /** Waits until the server answers. RudderError: it does not within so many seconds. */
  async waitReady(seconds = 60): Promise<void> {
    const end = Date.now() + seconds * 1000;
    for (;;) {
      try {
        await this.model();
        return;
      } catch (failure) {
        if (!(failure instanceof RudderError) || failure.code !== "UNAVAILABLE" || Date.now() > end) {
          throw failure;
        }
        await new Promise((resolve) => setTimeout(resolve, 200));
      }
    }
  }
}

function chunkOf(delta: ChoiceDelta, requestId: string, features: FeatureInfo[]): Chunk {
  return {
    requestId,
    index: delta.index,
    text: delta.text,
    tokenIds: delta.tokenIds,
    activations: activationsOf(delta.activations, features),
    finishReason: finishReasonOf(delta),
    refusal: delta.refusal?.text,
    message: delta,
  };
}

function callOptions(options: CallOptions): { signal?: AbortSignal; timeoutMs?: number } {
  return {
    ...(options.signal === undefined ? {} : { signal: options.signal }),
    ...(options.timeoutMs === undefined ? {} : { timeoutMs: options.timeoutMs }),
  };
}

function withHeaders(headers: Record<string, string>): Interceptor {
  return (next) => (request) => {
    for (const [name, value] of Object.entries(headers)) {
      request.header.set(name, value);
    }
    return next(request);
  };
}

/** Returns whether an address is on this machine. */
export function isLocal(address: string): boolean {
  const host = address.startsWith("[") ? address.slice(1, address.indexOf("]")) : address.replace(/:\d+$/, "");
  return host === "localhost" || host === "::1" || (isIP(host) === 4 && host.startsWith("127."));
}
