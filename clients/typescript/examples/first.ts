// A first program by hand, as in the README: `node dist/examples/first.js [ADDRESS]`.
import { activationsOf, Client, Program } from "../src/index.js";

const client = new Client(process.argv[2] ?? "localhost:50051");
const bundle = (await client.model()).bundles.at(-1)!;
const star = (await client.search("star astronomy", { bundle: bundle.name, limit: 1 }))[0]!;
const program = new Program().at(star.site).add(star.index, 1.0, { unit: "max_activation" });
for await (const chunk of client.generate("The night sky", { steer: program, maxTokens: 40, temperature: 0.5, seed: 1n })) {
  process.stdout.write(chunk.text);
}
process.stdout.write("\n");
const read = await client.inspect("Viruses infect cells.", { report: { topK: 3 } });
const activations = activationsOf(read.activations, read.features);
for (const [position, text] of read.tokenTexts.entries()) {
  const own = activations.filter((activation) => activation.position === position);
  console.log(text, own.map(({ feature, value }) => [feature.label, value.toFixed(1)]));
}
client.close();
