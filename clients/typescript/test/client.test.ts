// Against a running server, whose addresses are in RUDDER_GRPC (host:port) and RUDDER_HTTP (a URL).
import assert from "node:assert/strict";
import { after, test } from "node:test";
import OpenAI from "openai";
import { Client, finishReasonOf, isLocal, Program, RudderError } from "../src/index.js";
import type { Chunk } from "../src/index.js";

const address = process.env["RUDDER_GRPC"]!;
const client = new Client(address, { timeoutMs: 600_000 });
const openai = new OpenAI({ baseURL: process.env["RUDDER_HTTP"]!, apiKey: "none", maxRetries: 0 });
const greedy = { maxTokens: 8, temperature: 0 };
after(() => client.close());

async function chunksOf(stream: AsyncIterable<Chunk>): Promise<Chunk[]> {
  const chunks: Chunk[] = [];
  for await (const chunk of stream) {
    chunks.push(chunk);
  }
  return chunks;
}

test("a stream has the text of the whole answer", async () => {
  const whole = await client.complete("The cell membrane", greedy);
  const chunks = await chunksOf(client.generate("The cell membrane", greedy));
  assert.equal(chunks.map((chunk) => chunk.text).join(""), whole.choices[0]!.text);
  assert.equal(chunks.at(-1)!.finishReason, "length");
  assert.equal(finishReasonOf(whole.choices[0]!), "length");
  assert.equal(chunks.at(-1)!.message.attestation!.requestId, chunks[0]!.requestId);
});

test("a program steers, reports and is attested", async () => {
  const { site } = (await client.search("cell", { limit: 1 }))[0]!;
  const program = new Program({ name: "up" }).at(site, { maxDisplacement: 0.9 }).set(7, 40).add({ feature: 8 }, 1, { phase: "generated" });
  const plain = await client.complete("The cell membrane", greedy);
  const chunks = await chunksOf(
    client.generate("The cell membrane", { ...greedy, steer: program, report: { topK: 2, features: { [site]: [7] } } }),
  );
  const { edits } = chunks.at(-1)!.message.attestation!;
  assert.deepEqual(edits.map(({ origin, site, operation }) => [origin, site, operation]), [
    ["request", site, "set 40"],
    ["request", site, "add 1"],
  ]);
  assert.ok(edits.every((edit) => edit.tokensTouched > 0));
  assert.notEqual(chunks.map((chunk) => chunk.text).join(""), plain.choices[0]!.text);
  const activations = chunks.flatMap((chunk) => chunk.activations);
  assert.ok(activations.length > 0);
  assert.ok(activations.every(({ feature, value }) => feature.site === site && value > 0));
});

test("named programs, chats, token ids and inspection", async () => {
  const [named] = await client.programs();
  const messages = [{ role: "user", content: "What is a cell?" }];
  assert.ok((await client.complete(messages, { ...greedy, steer: named!.name })).choices[0]!.text);
  const { tokenIds } = await client.tokenize("The cell");
  assert.ok((await client.complete(tokenIds, greedy)).choices[0]!.text);
  const read = await client.inspect("Viruses infect cells.", { report: { topK: 3 } });
  assert.equal(read.tokenTexts.length, read.tokenIds.length);
  assert.ok(read.activations!.positions.length > 0);
  assert.equal((await client.feature(7)).summary!.index, 7);
  assert.ok((await client.explain()).statements.length > 0);
});

test("a refused call says why", async () => {
  await assert.rejects(client.complete("x", { temperature: 9, n: 1000 }), (error) => {
    assert.ok(error instanceof RudderError);
    assert.equal(error.code, "INVALID_ARGUMENT");
    assert.equal(error.reason, "FIELD_INVALID");
    assert.deepEqual(error.violations.map(({ field }) => field), ["sampling.temperature", "sampling.n"]);
    return true;
  });
  await assert.rejects(chunksOf(client.generate("x", { steer: "none" })), { reason: "PROGRAM_UNKNOWN" });
  await assert.rejects(client.complete("x", { temprature: 1 } as object), TypeError);
});

test("leaving a stream, a signal and a deadline end the call", async () => {
  for await (const chunk of client.generate("The cell", { maxTokens: 400, ignoreEos: true })) {
    assert.ok(chunk.requestId);
    break;
  }
  const signal = AbortSignal.timeout(300);
  const long = { maxTokens: 500, ignoreEos: true };
  await assert.rejects(chunksOf(client.generate("The cell", { ...long, signal })), RudderError);
  await assert.rejects(client.complete("The cell", { ...long, timeoutMs: 50 }), { code: "DEADLINE_EXCEEDED" });
});

test("a token is sent to this machine, or over TLS", () => {
  assert.ok(["localhost:1", "127.0.0.1:1", "[::1]:1"].every(isLocal));
  assert.ok(!["example.org:1", "127.example.org:1", "[::2]:1"].some(isLocal));
  assert.throws(() => new Client("example.org:1", { token: "secret" }), TypeError);
  new Client("example.org:1", { token: "secret", tls: true }).close();
});

test("OpenAI's client chats, streams, steers and is refused", async () => {
  const model = (await openai.models.list()).data[0]!.id;
  const messages = [{ role: "user" as const, content: "What is a cell?" }];
  const fields = { model, messages, max_tokens: 8, temperature: 0 };
  const whole = await openai.chat.completions.create(fields);
  const stream = await openai.chat.completions.create({ ...fields, stream: true });
  let text = "";
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
  }
  assert.equal(text, whole.choices[0]!.message.content);
  const response = await openai.responses.create({ model, input: "What is a cell?", max_output_tokens: 8, temperature: 0 });
  assert.equal(response.output_text, text);
  const [named] = await client.programs();
  const steered = await openai.chat.completions.create({ ...fields, rudder: { program: named!.name } } as typeof fields);
  const extension = (steered.choices[0] as unknown as { rudder: { attestation: { edits: unknown[] } } }).rudder;
  assert.ok(extension.attestation.edits.length > 0);
  await assert.rejects(openai.chat.completions.create({ ...fields, vllm_xargs: {} } as typeof fields), {
    status: 400,
    param: "vllm_xargs",
  });
});
