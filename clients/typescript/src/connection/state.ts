/**
 * The states of a connection as one table. A missing transition is a bug of the client, whatever the server sends.
 *
 *     awaiting_welcome   nothing can be sent, only WELCOME can arrive
 *     open               both sides can send
 *     draining           GOAWAY was received: responses still arrive, no new requests
 *     closed             ended: input is ignored, queued bytes are still sent
 */

export type State = "awaiting_welcome" | "open" | "draining" | "closed";

/** `end`: the transport ended, cleanly or not, or a timeout ends it. */
export type Input = "welcome" | "goaway" | "fatal" | "end";

export const TRANSITIONS: Readonly<Record<State, Readonly<Partial<Record<Input, State>>>>> = {
  awaiting_welcome: { welcome: "open", fatal: "closed", end: "closed" },
  open: { goaway: "draining", fatal: "closed", end: "closed" },
  draining: { goaway: "draining", fatal: "closed", end: "closed" },
  closed: { end: "closed" },
};

/** Return the next state. Throws if the transition is missing, which is a bug. */
export function nextState(state: State, input: Input): State {
  const next = TRANSITIONS[state][input];
  if (next === undefined) {
    throw new Error(`bug: ${input} in state ${state}`);
  }
  return next;
}
