import { fromBinary } from "@bufbuild/protobuf";
import type { DescMessage, MessageShape } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/rudder/v1/error_pb.js";

/** An invalid field: its path in the request, and the reason. */
export interface FieldViolation {
  field: string;
  description: string;
}

/** A call that failed. */
export class RudderError extends Error {
  override readonly name = "RudderError";
  /** Name of the gRPC status code, such as INVALID_ARGUMENT. */
  readonly code: string;
  /** The server's reason, such as FEATURE_UNKNOWN; empty if the call did not reach the server. */
  readonly reason: string;
  readonly violations: FieldViolation[];
  /** Seconds after which to try again; undefined if that does not help. */
  readonly retryAfter: number | undefined;
  readonly metadata: Record<string, string>;

  constructor(failure: ConnectError) {
    const info = detail(failure, "ErrorInfo", ErrorInfoSchema);
    const retry = detail(failure, "RetryInfo", RetryInfoSchema)?.retryDelay;
    const code = Code[failure.code].replace(/(?<=.)([A-Z])/g, "_$1").toUpperCase();
    super(`${info?.reason || code}: ${failure.rawMessage}`, { cause: failure });
    this.code = code;
    this.reason = info?.reason ?? "";
    this.metadata = info?.metadata ?? {};
    const violations = detail(failure, "BadRequest", BadRequestSchema)?.fieldViolations ?? [];
    this.violations = violations.map(({ field, description }) => ({ field, description }));
    this.retryAfter = retry && Number(retry.seconds) + retry.nanos / 1e9;
  }
}

/** Returns the detail of a status that has the type `google.rpc.NAME`, of which the contract has its own copy. */
function detail<D extends DescMessage>(failure: ConnectError, name: string, schema: D): MessageShape<D> | undefined {
  for (const packed of failure.details) {
    if ("type" in packed && packed.type === `google.rpc.${name}`) {
      return fromBinary(schema, packed.value);
    }
  }
  return undefined;
}

/** Returns the result of a call; RudderError in place of the errors of gRPC. */
export async function translated<T>(work: Promise<T>): Promise<T> {
  try {
    return await work;
  } catch (failure) {
    throw failure instanceof ConnectError ? new RudderError(failure) : failure;
  }
}
