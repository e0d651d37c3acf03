/* A model of sessions on two nodes whose store fails. tests/spec/test_store_model.py checks it with spin; by hand:
 *
 *     rules='-DWATCH_ROLE -DREPEAT -DDISTRUST -DCONFIRM -DPENDING -DGRACE_ENDS -DONE_PAIR -DLIMIT'
 *     spin $rules -DFAILOVER -DPAUSE -DFAULTS=2 -run -safety -DCOLLAPSE -m200000 spec/store.pml
 *     spin $rules -DFAILOVER -DPAUSE -DFAULTS=2 -p -g -t spec/store.pml       shows a counterexample step by step
 *
 * Time passes in ticks, the interval of the heartbeat; steps between two ticks come in any order. In each tick a node
 * that runs asks the store once. Ages, not times, are counted, so that runs have any length. FAULTS is the number of
 * faults in a run, of the kinds that are defined: FAILOVER (the new primary lacks any number of writes, the old one
 * takes writes for a while), PAUSE, CUT (a node cannot reach the store), CRASH.
 *
 * Properties:
 * - Later than BOUND ticks after a revocation or a rotation was acknowledged, no node accepts an earlier token. The node
 *   that acknowledged it accepts none at all. Time in which only nodes that cannot write know of it does not count.
 * - A node that cannot reach the store accepts nothing after GRACE.
 * - Two nodes do not accept different tokens of a session for longer than BOUND.
 * - A client that got no answer to a refresh may repeat it on any node, and keeps its session.
 * - With SESSIONS=2, a user with a limit of one does not have two sessions for longer than BOUND.
 *
 * Rules (each can be left out), and the modules of zcproto that implement them:
 *   WATCH_ROLE  a heartbeat checks that the server is still the primary. Without it the server only has to answer.
 *               (stores/valkey/servers.py)
 *   REPEAT      a node that was disconnected first repeats the revocations and rotations in its memory.
 *               (stores/revoker.py)
 *   DISTRUST    a node that was paused accepts nothing before it has asked the store. Without an answer the pause counts
 *               to the grace. (stores/sync.py)
 *   CONFIRM     only the primary's answer counts for that. (stores/valkey/store.py)
 *   PENDING     a revocation that cannot be written is in a file before it is acknowledged, and written before anything
 *               else once the store is back. (stores/pending.py)
 *   GRACE_ENDS  the grace of an outage is limited. (sessions/health.py)
 *   ONE_PAIR    a refresh that was just made is answered with the same pair by all nodes. (stores/service.py)
 *   LIMIT       a session is opened, and the oldest one ended, in one step of the store. (stores/base.py)
 *
 * Searched completely, without an error: one fault of any kind (0.3 million states); two faults FAILOVER and PAUSE (1.0),
 * FAILOVER and CRASH (1.0), FAILOVER and CUT (3.7), CRASH and CUT (2.1), PAUSE and CUT (2.8), CRASH and PAUSE (0.4);
 * SESSIONS=2 without rotations and one FAILOVER (1.4).
 *
 * Not modelled: more nodes, three faults, a store that loses all data, a revocation of a user or a key, leases (which
 * tests/properties/nodes_model.py checks). What a failover
 * has lost is not expected of a node that has crashed, if no other node remembers it.
 */

#define ABSENT 0        /* not known, or not opened yet */
#define FIRST 1         /* its first token is good */
#define SECOND 2        /* node 0 has rotated it */
#define THIRD 3         /* node 1 has rotated it */
#define REVOKED 4

#define BOUND 3
#define GRACE 2
#define REPEATS 2
#define RETRIES 2

#ifndef SESSIONS
#define SESSIONS 1
#endif
#ifndef FAULTS
#define FAULTS 1
#endif

#define RUNS 0
#define PAUSED 1
#define DOWN 2

#define is_live(token) (token > ABSENT && token < REVOKED)
#define age(token) (token < THIRD -> token : token - 1)
#define of(owner, session) ((owner) * SESSIONS + (session))
#define stored(node, session) store[of(link[node], session)]
/* Whether the store has the token that the node has replaced itself, which it never accepts again. */
#define is_spent(node, session) (rotated[of(node, session)] && stored(node, session) == FIRST)

/* The store. A server has the state of each session, and how long the last rotation can be answered again. */
byte store[2 * SESSIONS];
byte recent[2 * SESSIONS];
bit primary;
bit is_synced = 1;              /* the other server follows the primary; before, it accepts writes that are lost */

/* The nodes. Their memory has the last known state, and REVOKED for good. */
byte memory[2 * SESSIONS];
byte rotated[2 * SESSIONS];     /* the successor of FIRST that it has given to a client */
bit pending[2 * SESSIONS];      /* has a revocation in its file */
byte state[2];
bit link[2];                    /* the server that the node uses */
bit is_due[2];                  /* has to ask the store before the next tick */
bit is_trusted[2] = 1;
byte paused_for[2];             /* ticks in which it has not asked the store */
#ifndef LIMIT
bit is_free[2];                 /* has counted the sessions of the user */
#endif
bit is_cut[2];                  /* cannot reach the store, */
bit is_out[2];                  /* and has found out */
bit has_gap[2];                 /* was not connected for a while */
byte grace[2];
byte repeats[2];

byte faults = FAULTS;

/* What is expected. */
byte known[SESSIONS];           /* the age of the last acknowledged state, */
byte since[SESSIONS];           /* and the ticks since all nodes can know it */
byte own[2 * SESSIONS];         /* the same of what a node has acknowledged itself */
byte cut_for[2];
byte retry[SESSIONS];           /* how long a client may repeat a rotation whose answer it did not get */
bit was_tried[SESSIONS];
bit was_stored[SESSIONS];       /* whether a revocation has been written */
byte differ;                    /* the ticks in which two nodes accept different tokens of a session, */
byte surplus;                   /* or more sessions than allowed */

byte s;                         /* 0 between steps */
byte t;

inline decrease(counter) {
    counter = (counter > 0 -> counter - 1 : 0)
}

inline expect(session, token) {
    if
    :: age(token) > known[session] -> known[session] = age(token); since[session] = 0
    :: else
    fi
}

inline acknowledge(node, session, token) {
    expect(session, token);
    if
    :: age(token) > own[of(node, session)] -> own[of(node, session)] = age(token)
    :: else
    fi
}

#define remembered(node) (pending[of(node, s)] || memory[of(node, s)] == REVOKED -> 3 : (rotated[of(node, s)] -> 2 : 0))
#define least(x, y) (x < y -> x : y)
#define most(x, y) (x > y -> x : y)

/* Expect nothing that the store had and has lost, if no node remembers it: one that did has crashed. */
inline forget_lost() {
    for (s : 0 .. SESSIONS - 1) {
        if
        :: known[s] < 3 || was_stored[s] ->
            t = most(age(store[of(primary, s)]), remembered(0));
            own[of(0, s)] = least(own[of(0, s)], t);
            known[s] = least(known[s], most(t, remembered(1)));
            t = most(age(store[of(primary, s)]), remembered(1));
            own[of(1, s)] = least(own[of(1, s)], t)
        :: else
        fi
    }
    s = 0; t = 0
}

inline replay(node) {
    for (s : 0 .. SESSIONS - 1) {
        if
        :: pending[of(node, s)] && stored(node, s) != ABSENT -> stored(node, s) = REVOKED; was_stored[s] = 1
        :: else
        fi;
        pending[of(node, s)] = 0
    }
    s = 0
}

inline repeat_rotations(node) {
    for (s : 0 .. SESSIONS - 1) {
        if
        :: rotated[of(node, s)] && stored(node, s) == FIRST ->
            stored(node, s) = rotated[of(node, s)];
            recent[of(link[node], s)] = RETRIES
        :: else
        fi
    }
    s = 0
}

inline repeat_revocations(node) {
    for (s : 0 .. SESSIONS - 1) {
        if
        :: memory[of(node, s)] == REVOKED && stored(node, s) != ABSENT -> stored(node, s) = REVOKED; was_stored[s] = 1
        :: else
        fi
    }
    s = 0
}

/* Adopt what the store has. A session that is not in use is forgotten instead, and looked up by the next request. */
inline adopt(node) {
    for (s : 0 .. SESSIONS - 1) {
        if
        :: is_live(memory[of(node, s)]) && memory[of(node, s)] != stored(node, s) ->
            if
            :: memory[of(node, s)] = ABSENT
            :: !is_spent(node, s) -> memory[of(node, s)] = (stored(node, s) == ABSENT -> REVOKED : stored(node, s))
            fi
        :: else
        fi
    }
    s = 0
}

inline reach(node) {
    if
    :: link[node] != primary ->
#ifdef WATCH_ROLE
        link[node] = primary; has_gap[node] = 1
#else
        if
        :: link[node] = primary; has_gap[node] = 1      /* the old primary has stopped */
        :: skip                                         /* it still answers */
        fi
#endif
    :: else
    fi
}

inline heartbeat(node) {
    is_due[node] = 0;
    if
    :: is_cut[node] ->
        if
        :: !is_out[node] -> is_out[node] = 1; grace[node] = GRACE
        :: else -> decrease(grace[node])
        fi;
        grace[node] = (grace[node] > paused_for[node] -> grace[node] - paused_for[node] : 0);
        paused_for[node] = 0;
        is_trusted[node] = 1;
        has_gap[node] = 1
    :: else ->
        reach(node);
        replay(node);
        if
        :: has_gap[node] ->
            has_gap[node] = 0;
#ifdef REPEAT
            repeat_revocations(node);
            repeats[node] = REPEATS + 1
#endif
        :: else
        fi;
        if
        :: repeats[node] > 0 -> repeats[node]--; repeat_rotations(node)
        :: else
        fi;
        adopt(node);
        is_out[node] = 0;
        paused_for[node] = 0;
        is_trusted[node] = 1
    fi
}

#ifdef GRACE_ENDS
#define accepts(node) (state[node] == RUNS && is_trusted[node] && (!is_out[node] || grace[node] > 0))
#else
#define accepts(node) (state[node] == RUNS && is_trusted[node])
#endif
#define works(node) (accepts(node) && !is_out[node] && !is_cut[node])
/* The old primary refuses writes once it follows the new one. */
#define writes(node) (works(node) && (link[node] == primary || !is_synced))

inline request(node, session) {
    if
    :: memory[of(node, session)] == ABSENT && works(node) && !is_spent(node, session) -> memory[of(node, session)] = stored(node, session)
    :: else
    fi;
    if
    :: is_live(memory[of(node, session)]) ->
        assert(age(memory[of(node, session)]) >= own[of(node, session)]);
        assert(age(memory[of(node, session)]) >= known[session] || since[session] <= BOUND || is_out[node]);
        assert(cut_for[node] <= GRACE + 1)
    :: else
    fi
}

/* A client shows the refresh token of FIRST: for the first time, again because it got no answer, or it was stolen. */
inline rotate(node, session) {
    if
    :: stored(node, session) == FIRST ->
        stored(node, session) = SECOND + node;
        recent[of(link[node], session)] = RETRIES;
        rotated[of(node, session)] = SECOND + node;
        memory[of(node, session)] = SECOND + node;
        if
        :: acknowledge(node, session, SECOND); was_tried[session] = 1; retry[session] = 0
        :: !was_tried[session] -> was_tried[session] = 1; retry[session] = RETRIES
        fi
#ifdef ONE_PAIR
    :: (stored(node, session) == SECOND || stored(node, session) == THIRD) && recent[of(link[node], session)] > 0 ->
        memory[of(node, session)] = stored(node, session);
        rotated[of(node, session)] = stored(node, session);
        expect(session, SECOND);
        retry[session] = 0
    :: (stored(node, session) == SECOND || stored(node, session) == THIRD) && recent[of(link[node], session)] == 0 ->
#else
    :: stored(node, session) == SECOND || stored(node, session) == THIRD ->
#endif
        assert(retry[session] == 0);
        stored(node, session) = REVOKED; was_stored[session] = 1;
        memory[of(node, session)] = REVOKED;
        acknowledge(node, session, REVOKED)
    :: stored(node, session) == REVOKED -> memory[of(node, session)] = REVOKED
    :: else
    fi
}

inline revoke(node, session) {
    if
    :: writes(node) -> stored(node, session) = REVOKED; was_stored[session] = 1
    :: else ->
#ifdef PENDING
        pending[of(node, session)] = 1;
#endif
        if
        :: !is_out[node] -> is_out[node] = 1; grace[node] = GRACE
        :: else
        fi
    fi;
    memory[of(node, session)] = REVOKED;
    acknowledge(node, session, REVOKED)
}

/* Open a session. The limit is one, and the oldest session ends. */
inline open(node, session, other) {
    if
    :: is_live(stored(node, other)) ->
        stored(node, other) = REVOKED; was_stored[other] = 1;
        memory[of(node, other)] = REVOKED;
        acknowledge(node, other, REVOKED)
    :: else
    fi;
    create(node, session)
}

inline create(node, session) {
    stored(node, session) = FIRST;
    memory[of(node, session)] = FIRST;
    acknowledge(node, session, FIRST)
}

inline crash(node) {
    state[node] = DOWN;
    for (s : 0 .. SESSIONS - 1) {
        memory[of(node, s)] = ABSENT;
        rotated[of(node, s)] = 0;
        own[of(node, s)] = (own[of(node, s)] == 3 -> 3 : 0)
    }
    s = 0;
    grace[node] = 0; repeats[node] = 0; is_due[node] = 0; is_trusted[node] = 1; paused_for[node] = 0;
    forget_lost()
}

inline start(node) {
    state[node] = RUNS;
    link[node] = primary;
    is_out[node] = 1;           /* it accepts nothing before it has reached the store */
    has_gap[node] = 1;
    is_due[node] = 1
}

proctype Node(bit node; bit session) {
    bit other = 1 - session;
end:    do
    :: atomic { session == 0 && is_due[node] && state[node] == RUNS -> heartbeat(node) }
#ifndef CONFIRM
    :: atomic { session == 0 && state[node] == RUNS && !is_trusted[node] && !is_cut[node] -> is_trusted[node] = 1 }
#endif
    :: atomic { accepts(node) && memory[of(node, session)] != REVOKED -> request(node, session) }
#if SESSIONS == 1
    :: atomic { writes(node) && memory[of(node, session)] != REVOKED -> rotate(node, session) }
#endif
    :: atomic { state[node] == RUNS && known[session] > 0 && known[session] < 3 -> revoke(node, session) }
#if SESSIONS == 2
#ifdef LIMIT
    :: atomic { writes(node) && known[session] == 0 && stored(node, session) == ABSENT -> open(node, session, other) }
#else
    :: atomic { writes(node) && known[session] == 0 && !is_live(stored(node, other)) -> is_free[node] = 1 }
    :: atomic { writes(node) && known[session] == 0 && is_free[node] -> create(node, session) }
#endif
#endif
    od
}

inline copy() {
    for (s : 0 .. SESSIONS - 1) {
        store[of(1 - primary, s)] = store[of(primary, s)];
        recent[of(1 - primary, s)] = recent[of(primary, s)]
    }
    s = 0
}

/* Faults, and what ends them. */
proctype Fault(bit node) {
end:    do
    :: atomic { node == 0 && is_synced -> copy() }          /* replication */
    :: atomic {
        node == 0 && !is_synced ->
        copy();
        is_synced = 1;
        /* Its connections are closed. */
        has_gap[0] = has_gap[0] || link[0] != primary;
        has_gap[1] = has_gap[1] || link[1] != primary
      }
#ifdef FAILOVER
    :: atomic {
        node == 0 && faults > 0 && is_synced ->
        faults--;
        primary = 1 - primary;
        is_synced = 0;
        forget_lost();
        for (s : 0 .. SESSIONS - 1) { since[s] = 0 }
        s = 0; differ = 0; surplus = 0
      }
#endif
#ifdef PAUSE
    :: atomic { faults > 0 && state[node] == RUNS -> faults--; state[node] = PAUSED }
    :: atomic {
        state[node] == PAUSED ->
        state[node] = RUNS;
#ifdef DISTRUST
        is_trusted[node] = 0
#endif
      }
#endif
#ifdef CUT
    :: atomic { faults > 0 && !is_cut[node] -> faults--; is_cut[node] = 1 }
    :: atomic { is_cut[node] -> is_cut[node] = 0; cut_for[node] = 0 }
#endif
#ifdef CRASH
    :: atomic { faults > 0 && state[node] == RUNS -> faults--; crash(node) }
    :: atomic { state[node] == DOWN -> start(node) }
#endif
    od
}

/* Whether a node has something that the primary lacks, and cannot write it now. */
#define holds(node) ((state[node] != RUNS || is_cut[node]) && \
    (pending[of(node, s)] || memory[of(node, s)] == REVOKED || rotated[of(node, s)]))
#define is_undisturbed(node) (accepts(node) && !is_out[node] && !is_cut[node])
#define keeps(node, session) (is_undisturbed(node) && is_live(memory[of(node, session)]))
#define is_open(session) (is_live(store[of(primary, session)]) || keeps(0, session) || keeps(1, session))

proctype Clock() {
end:    do
    :: atomic {
        (!is_due[0] || state[0] != RUNS) && (!is_due[1] || state[1] != RUNS) ->
        is_due[0] = state[0] != DOWN;
        is_due[1] = state[1] != DOWN;
        for (s : 0 .. SESSIONS - 1) {
            if
            :: age(store[of(primary, s)]) < known[s] && (holds(0) || holds(1)) -> since[s] = 0
            :: else -> since[s] = (since[s] > BOUND -> since[s] : since[s] + 1)
            fi;
            decrease(retry[s]);
            decrease(recent[of(0, s)]);
            decrease(recent[of(1, s)])
        }
        s = 0;
        paused_for[0] = (state[0] == PAUSED && paused_for[0] < GRACE -> paused_for[0] + 1 : paused_for[0]);
        paused_for[1] = (state[1] == PAUSED && paused_for[1] < GRACE -> paused_for[1] + 1 : paused_for[1]);
        cut_for[0] = (is_cut[0] -> (cut_for[0] > GRACE + 1 -> cut_for[0] : cut_for[0] + 1) : 0);
        cut_for[1] = (is_cut[1] -> (cut_for[1] > GRACE + 1 -> cut_for[1] : cut_for[1] + 1) : 0);
        differ = (keeps(0, 0) && keeps(1, 0) && memory[of(0, 0)] != memory[of(1, 0)] -> differ + 1 : 0);
        assert(differ <= BOUND);
#if SESSIONS == 2
        surplus = (is_open(0) && is_open(1) -> surplus + 1 : 0);
        assert(surplus <= BOUND)
#endif
      }
    od
}

init {
    atomic {
#if SESSIONS == 1
        store[0] = FIRST; store[1] = FIRST; known[0] = 1;
#else
        run Node(0, 1); run Node(1, 1);
#endif
        run Node(0, 0); run Node(1, 0);
        run Fault(0); run Fault(1);
        run Clock()
    }
}
