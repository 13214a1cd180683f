import type { MessageInitShape } from "@bufbuild/protobuf";
import {
  BlendSchema,
  EditSchema,
  GateSchema,
  Phase,
  ProgramSchema,
  RowSchema,
  SiteEditsSchema,
  Unit,
} from "./gen/rudder/v1/program_pb.js";

type Init<T> = Exclude<T, { $typeName: string }>;
export type ProgramMessage = Init<MessageInitShape<typeof ProgramSchema>>;
type SiteEdits = Init<MessageInitShape<typeof SiteEditsSchema>>;
type Operation = NonNullable<Init<MessageInitShape<typeof EditSchema>>["operation"]>;
type Name = NonNullable<Operation["case"]>;

/** A latent of a served SAE (`bundle` is optional where the site has one), a control vector, or a linear probe. */
export type Row =
  | number
  | { feature: number; bundle?: string }
  | { vector: number[]; name?: string }
  | { probe: number[]; bias?: number; name?: string };

export interface EditOptions {
  /** Unit of the value: of the SAE's activations, multiples of the latent's maximum, or of the residual norm. */
  unit?: "absolute" | "max_activation" | "residual";
  /** Only at tokens where the row is above this activation. */
  whenAbove?: number;
  phase?: "both" | "prompt" | "generated";
}

export interface SiteOptions {
  restoreNorm?: boolean;
  /** Upper bound of the displacement as a share of the residual's norm. */
  maxDisplacement?: number;
}

const UNITS = { absolute: Unit.ABSOLUTE, max_activation: Unit.MAX_ACTIVATION, residual: Unit.RESIDUAL_NORM };
const PHASES = { both: Phase.BOTH, prompt: Phase.PROMPT, generated: Phase.GENERATED };

export function rowMessage(row: Row): Init<MessageInitShape<typeof RowSchema>> {
  if (typeof row === "number") {
    return { row: { case: "feature", value: { index: row } } };
  }
  if ("feature" in row) {
    return { row: { case: "feature", value: { index: row.feature, bundle: row.bundle ?? "" } } };
  }
  if ("vector" in row) {
    return { row: { case: "vector", value: { name: row.name ?? "", values: row.vector } } };
  }
  return { row: { case: "probe", value: { name: row.name ?? "", weights: row.probe, bias: row.bias ?? 0 } } };
}

/** Edits per site. Each method returns a new program; `at` selects the site of the next edits. */
export class Program {
  constructor(
    readonly message: ProgramMessage = {},
    private readonly site = "",
  ) {}

  /** Selects the site of the next edits. */
  at(site: string, options: SiteOptions = {}): Program {
    return new Program(this.changed(site, (edits) => ({ ...edits, ...options })), site);
  }

  /** Adds to the activation of a latent, or adds a multiple of a vector. */
  add(row: Row, by: number, options: EditOptions = {}): Program {
    return this.edit(row, { case: "add", value: by }, options);
  }

  /** Sets the activation. */
  set(row: Row, to: number, options: EditOptions = {}): Program {
    return this.edit(row, { case: "set", value: to }, options);
  }

  /** Sets the activation to 0. */
  ablate(row: Row, options: Omit<EditOptions, "unit"> = {}): Program {
    return this.edit(row, { case: "ablate", value: true }, options);
  }

  /** Multiplies the activation. */
  scale(row: Row, by: number, options: Omit<EditOptions, "unit"> = {}): Program {
    return this.edit(row, { case: "scale", value: by }, options);
  }

  /** Keeps the activation from going above a value. */
  cap(row: Row, at: number, options: EditOptions = {}): Program {
    return this.edit(row, { case: "cap", value: at }, options);
  }

  /** Keeps the activation from going below a value. */
  floor(row: Row, at: number, options: EditOptions = {}): Program {
    return this.edit(row, { case: "floor", value: at }, options);
  }

  /** The unlearning edit: where the row is active, its activation becomes this (usually negative) value. */
  clamp(row: Row, to: number, options: EditOptions = {}): Program {
    return this.edit(row, { case: "clamp", value: to }, options);
  }

  /** Moves the residual towards the mean of the bundle's corpus, or towards a vector. */
  blend(blend: Init<MessageInitShape<typeof BlendSchema>>): Program {
    return new Program(this.changed(this.here(), (edits) => ({ ...edits, blend })), this.site);
  }

  /** Sets the gate of the whole program: message Gate of the contract. */
  gate(gate: Init<MessageInitShape<typeof GateSchema>>): Program {
    return new Program({ ...this.message, gate }, this.site);
  }

  private edit(row: Row, operation: { case: Name; value: number | boolean }, options: EditOptions): Program {
    const edit = {
      row: rowMessage(row),
      operation: operation as Operation,
      unit: options.unit === undefined ? Unit.UNSPECIFIED : UNITS[options.unit],
      phase: options.phase === undefined ? Phase.UNSPECIFIED : PHASES[options.phase],
      ...(options.whenAbove === undefined ? {} : { whenAbove: options.whenAbove }),
    };
    const added = this.changed(this.here(), (edits) => ({ ...edits, edits: [...(edits.edits ?? []), edit] }));
    return new Program(added, this.site);
  }

  private here(): string {
    if (!this.site) {
      throw new TypeError("a program's edits have a site: call at(site) first");
    }
    return this.site;
  }

  private changed(site: string, change: (edits: SiteEdits) => SiteEdits): ProgramMessage {
    const sites = (this.message.sites ?? []) as SiteEdits[];
    const known = sites.some((edits) => edits.site === site);
    const all = known ? sites : [...sites, { site }];
    return { ...this.message, sites: all.map((edits) => (edits.site === site ? change(edits) : edits)) };
  }
}
