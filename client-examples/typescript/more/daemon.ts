// A daemon as the story sees it, whichever client it is talked to by.

/** A problem (RFC 9457): programs go by its code. */
export class Refused extends Error {
  constructor(readonly problem: { status: number; code: string; detail: string }) {
    super(`${problem.status} ${problem.code}: ${problem.detail}`);
  }
}

export interface Guest {
  id: string;
  name: string;
  state: string;
  generation: number;
  driver: { kind: string };
  labels: { [key: string]: string };
}
export type Strategy =
  | { kind: "shifted"; shift: { kind: "4gib" } }
  | { kind: "identity-cbit" };
export interface Events {
  items: { type: string; data: { state?: string } }[];
  next_cursor: string;
  more: boolean;
}

/** A daemon, by one of the clients. Whatever is refused is thrown as [Refused]. */
export interface Daemon {
  define(name: string, size: number): Promise<Guest>;
  get(name: string): Promise<Guest>;
  list(): Promise<{ items: Guest[] }>;
  /** The guest when it is not at `tag` any more; nothing when half a minute has passed. */
  changed(name: string, tag: string): Promise<Guest | undefined>;
  start(name: string): Promise<unknown>;
  stop(name: string): Promise<unknown>;
  remove(name: string): Promise<unknown>;
  relabel(name: string, tag: string): Promise<Guest>;
  plan(name: string, strategy: Strategy): Promise<{ strategy: { kind: string }; slots: unknown[] }>;
  mirror(name: string, strategy: Strategy): Promise<{ id: string; state: string }>;
  removeMirror(id: string): Promise<unknown>;
  check(name: string, host: string): Promise<{ migratable: boolean; blockers: unknown[] }>;
  migrate(name: string, host: string, key: string): Promise<{ id: string }>;
  events(after: string | undefined, resource: string[], limit: number): Promise<Events>;
  /** The ids of the first events after a cursor, read from the stream; nothing where the client has no streams. */
  follow?(after: string, count: number): Promise<string[]>;
}
