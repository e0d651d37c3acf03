/**
 * The states of a conversation, as one table. What is not in it is a bug of ours, never an answer to the server's input.
 *
 *     awaiting_welcome   nothing may be sent, and WELCOME alone may arrive
 *     open               both sides may send
 *     draining           GOAWAY was said: what runs is answered, nothing new is taken
 *     closed             over: nothing is read any more; what is queued is still to be sent
 */

export type State = "awaiting_welcome" | "open" | "draining" | "closed";

/** `end`: the transport ended, cleanly or not, or a timeout says that it must. */
export type Input = "welcome" | "goaway" | "fatal" | "end";

export const TRANSITIONS: Readonly<Record<State, Readonly<Partial<Record<Input, State>>>>> = {
  awaiting_welcome: { welcome: "open", fatal: "closed", end: "closed" },
  open: { goaway: "draining", fatal: "closed", end: "closed" },
  draining: { goaway: "draining", fatal: "closed", end: "closed" },
  closed: { end: "closed" },
};

/** The state that follows. Throws if there is none, which is a bug here. */
export function nextState(state: State, input: Input): State {
  const next = TRANSITIONS[state][input];
  if (next === undefined) {
    throw new Error(`bug: ${input} in state ${state}`);
  }
  return next;
}
