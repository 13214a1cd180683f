import type { MessageInitShape } from "@bufbuild/protobuf";
import { ReportSchema, SamplingSchema } from "./gen/rudder/v1/inference_pb.js";
import type { PromptSchema, SteeringSchema } from "./gen/rudder/v1/inference_pb.js";
import { Program, rowMessage } from "./program.js";
import type { Row } from "./program.js";

type Init<T> = Exclude<T, { $typeName: string }>;
export type Sampling = Init<MessageInitShape<typeof SamplingSchema>>;
type ReportMessage = Init<MessageInitShape<typeof ReportSchema>>;

export interface Message {
  role: string;
  content: string;
}

/** Text, token ids, or the messages of a chat. */
export type Prompt = string | number[] | Message[] | Chat;

/** The messages of a chat, with variables of the model's template. */
export interface Chat {
  messages: Message[];
  arguments?: Record<string, unknown>;
  continueFinalMessage?: boolean;
}

/** A topic to steer towards: a concept of a served bundle. By default at strength 1, the largest that keeps texts fluent. */
export interface Topic {
  topic: string;
  strength?: number;
  kl?: number;
}

/** The name of one of the operator's programs, a program, or a topic. */
export type Steer = string | Program | Topic;

/** Features to report: rows by site, and the `topK` strongest latents of each token. */
export interface Report extends Omit<ReportMessage, "features"> {
  features?: Record<string, Row[]>;
}

/** What every call with a prompt takes beside it. */
export interface CallOptions {
  steer?: Steer;
  report?: Report;
  cacheSalt?: string;
  /** Ends the call. */
  signal?: AbortSignal;
  timeoutMs?: number;
}

/** Sampling parameters, with the defaults of vLLM, beside the others. */
export interface GenerateOptions extends CallOptions, Sampling {
  /** Tokens per message, at least. */
  streamInterval?: number;
  /** Keep so many tokens, the last of the prompt. */
  truncatePromptTokens?: number;
}

export function promptMessage(prompt: Prompt, truncatePromptTokens?: number): MessageInitShape<typeof PromptSchema> {
  const rest = truncatePromptTokens === undefined ? {} : { truncatePromptTokens };
  if (typeof prompt === "string") {
    return { prompt: { case: "text", value: prompt }, ...rest };
  }
  if (!Array.isArray(prompt)) {
    const templateArguments = prompt.arguments ? JSON.stringify(prompt.arguments) : "";
    const { messages, continueFinalMessage = false } = prompt;
    return { prompt: { case: "chat", value: { messages, templateArguments, continueFinalMessage } }, ...rest };
  }
  if (prompt.every((part) => typeof part === "number")) {
    return { prompt: { case: "tokenIds", value: { ids: prompt } }, ...rest };
  }
  if (prompt.some((part) => typeof part === "number")) {
    throw new TypeError("prompt: give token ids or the messages of a chat, not both");
  }
  return { prompt: { case: "chat", value: { messages: prompt as Message[] } }, ...rest };
}

export function steeringMessage(steer: Steer): MessageInitShape<typeof SteeringSchema> {
  if (typeof steer === "string") {
    return { steering: { case: "name", value: steer } };
  }
  if (steer instanceof Program) {
    return { steering: { case: "program", value: steer.message } };
  }
  const { topic, strength, kl } = steer;
  if (strength !== undefined && kl !== undefined) {
    throw new TypeError("steer: give strength or kl, not both");
  }
  const value = strength === undefined ? kl : strength;
  const amount =
    value === undefined ? {} : { amount: { case: strength === undefined ? ("kl" as const) : ("strength" as const), value } };
  return { steering: { case: "topic", value: { topic, ...amount } } };
}

export function reportMessage(report: Report): ReportMessage {
  const { features = {}, ...rest } = report;
  const rows = Object.entries(features).flatMap(([site, listed]) =>
    listed.map((row) => ({ site, row: rowMessage(row) })),
  );
  return { ...rest, features: rows };
}

/** Returns the fields that every request with a prompt has. */
export function commonFields(prompt: Prompt, options: CallOptions & { truncatePromptTokens?: number }) {
  return {
    prompt: promptMessage(prompt, options.truncatePromptTokens),
    cacheSalt: options.cacheSalt ?? "",
    ...(options.steer === undefined ? {} : { steering: steeringMessage(options.steer) }),
    ...(options.report === undefined ? {} : { report: reportMessage(options.report) }),
  };
}

/** Returns the sampling parameters among the options. */
export function samplingMessage(options: GenerateOptions): Sampling {
  const names = SamplingSchema.fields.map((field) => field.localName);
  const unknown = Object.keys(options).filter((name) => !names.includes(name) && !OTHERS.includes(name));
  if (unknown.length) {
    throw new TypeError(`${unknown[0]}: is no option of this call`);
  }
  return Object.fromEntries(Object.entries(options).filter(([name]) => names.includes(name))) as Sampling;
}

const OTHERS = ["steer", "report", "cacheSalt", "signal", "timeoutMs", "streamInterval", "truncatePromptTokens"];
