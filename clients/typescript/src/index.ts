/**
 * Client of the Rudder server: steered generation, and the SAE features of a model.
 *
 *     const client = new Client("localhost:50051");
 *     const calm = new Program().at("layers.2.resid_post").clamp(12, -2, { unit: "residual" });
 *     for await (const chunk of client.generate("The virus", { steer: calm, maxTokens: 50 })) {
 *       process.stdout.write(chunk.text);
 *     }
 */
export * from "./client.js";
export * from "./errors.js";
export { Program } from "./program.js";
export type { EditOptions, ProgramMessage, Row, SiteOptions } from "./program.js";
export type { CallOptions, Chat, GenerateOptions, Message, Prompt, Report, Sampling, Steer, Topic } from "./requests.js";
export * from "./gen/rudder/v1/catalogue_pb.js";
export * as inference from "./gen/rudder/v1/inference_pb.js";
export * as policy from "./gen/rudder/v1/policy_pb.js";
