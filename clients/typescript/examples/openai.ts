// OpenAI's client for Node, with steering in the field `rudder`: `node dist/examples/openai.js [URL]`.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2] ?? "http://localhost:8000/v1", apiKey: "none" });
const model = (await client.models.list()).data[0]!.id;
const request = { model, prompt: "The night sky", max_tokens: 20, rudder: { program: "more-astronomy" } };
const answer = await client.completions.create(request);
const choice = answer.choices[0] as OpenAI.CompletionChoice & { rudder: { attestation: { edits: unknown[] } } };
console.log(choice.text);
console.log(choice.rudder.attestation.edits);
