/* A model of revocation and rotation with a store that fails over. Check it with spin:
 *
 *     spin -DWATCH_ROLE -DREPEAT -DDISTRUST -run -safety spec/store.pml      all rules: no error
 *     spin -DREPEAT -DDISTRUST -run -safety spec/store.pml                   without one: a counterexample
 *     spin -DREPEAT -DDISTRUST -p -t spec/store.pml                          shows it step by step
 *
 * A family of tokens is in one of three states: its first token is good (0), its second one is (1), or it is revoked
 * (2). A rotation or a revocation advances it. A node accepts the token of the state in its memory. The store has a
 * primary and a replica, which copies with any delay: a failover loses what was not copied.
 *
 * Time passes in ticks, the interval of the heartbeat; steps between two ticks come in any order. In each tick a node
 * that is not paused asks the store once. At most one fault happens: a failover, or a pause of any length.
 *
 * Property: later than BOUND ticks after an advance was acknowledged, no node accepts an earlier token. So a revoked family is
 * refused by all, and two nodes do not disagree about the good token of a family.
 *
 * Rules (each can be left out), and the modules of zcproto/stores that implement them:
 *   WATCH_ROLE  a heartbeat checks that the server is still the primary. Without it the server only has to answer.
 *               (valkey/servers.py, valkey/sentinels.py)
 *   REPEAT      a node that changes to another server first repeats the advances in its memory. (revoker.py)
 *   DISTRUST    a node that was paused accepts nothing before the store has answered. (stall.py, sync.py)
 *
 * Not modelled: limits of sessions per user, the grace of an outage, the file of pending revocations, two faults at
 * the same time, such as the loss of the only node that remembers an advance which the failover lost.
 */

#define OLD 0
#define NEW 1
#define REVOKED 2
#define BOUND 3
#define LAST_TICK 7

byte store[2];          /* the state of the family on each server */
byte primary = OLD;
byte link[2] = OLD;     /* the server that each node uses */
byte memory[2];         /* the state of the family that each node last saw */
bool is_due[2];         /* has to ask the store before the next tick */
bool is_paused[2];
bool is_trusted[2] = true;
bool had_fault;
byte tick;
byte acknowledged;      /* the last acknowledged state, */
byte acknowledged_at;   /* and its tick */

inline use_primary(node) {
    if
    :: link[node] != primary ->
        link[node] = primary;
#ifdef REPEAT
        if
        :: memory[node] > store[primary] -> store[primary] = memory[node]
        :: else
        fi
#endif
    :: else
    fi
}

inline heartbeat(node) {
#ifdef WATCH_ROLE
    use_primary(node);
#else
    if
    :: use_primary(node)    /* the old primary has stopped */
    :: skip                 /* it still answers */
    fi;
#endif
    if
    :: store[link[node]] > memory[node] -> memory[node] = store[link[node]]
    :: else
    fi;
    is_trusted[node] = true;
    is_due[node] = false
}

proctype Node(byte node) {
end:    do
    :: atomic { is_due[node] && !is_paused[node] -> heartbeat(node) }
    /* A rotation or a revocation: written, then acknowledged. The store refuses what is older than its own. */
    :: atomic {
        !is_paused[node] && is_trusted[node] && memory[node] < REVOKED && store[link[node]] == memory[node] ->
        if
        :: memory[node]++
        :: memory[node] = REVOKED
        fi;
        store[link[node]] = memory[node];
        if
        :: memory[node] > acknowledged -> acknowledged = memory[node]; acknowledged_at = tick
        :: else
        fi
      }
    /* A request with the token of the state in memory. */
    :: atomic {
        !is_paused[node] && is_trusted[node] && memory[node] < REVOKED ->
        assert(memory[node] >= acknowledged || tick <= acknowledged_at + BOUND)
      }
    :: atomic { !had_fault -> had_fault = true; is_paused[node] = true }
    :: atomic {
        is_paused[node] ->
        is_paused[node] = false;
#ifdef DISTRUST
        is_trusted[node] = false
#endif
      }
    od
}

active proctype Store() {
end:    do
    :: atomic { store[primary] > store[1 - primary] -> store[1 - primary] = store[primary] }   /* replication */
    :: atomic { !had_fault -> had_fault = true; primary = NEW }                                /* failover */
    od
}

active proctype Clock() {
end:    do
    :: atomic {
        tick < LAST_TICK && (!is_due[0] || is_paused[0]) && (!is_due[1] || is_paused[1]) ->
        tick++;
        is_due[0] = true;
        is_due[1] = true
      }
    od
}

init {
    atomic { run Node(0); run Node(1) }
}
