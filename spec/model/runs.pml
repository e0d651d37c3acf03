/* A model of one durable run: its owner, the store with a replica, two readers in other processes, and faults.
 * tests/spec/test_run_models.py checks it with spin; README.md says how to do that by hand.
 *
 * The store is a log with the number of its items, the first one that is kept, the end, the newest attachment, and the
 * sign of life of the owner. A failover puts the replica's older copy in its place. The budgets of faults are CUTS
 * (connections of readers), LOSSES (of the owner to the store: an append is executed later, or never, and has no reply),
 * FAILOVERS, PAUSES and KILLS (of the owner). All processes go on when the faults are over, and each reader must then
 * come to an end: spin reports a state from which nothing goes on as an invalid end state.
 *
 * Properties:
 * - A reader gets each item once and in order. No item that the newest reader needs is dropped.
 * - Nothing follows the end. All readers see the same end, and none has had an item behind it.
 * - An owner that runs, and was not paused, is not declared lost; a run that has returned is not, either.
 *
 * Rules (each can be left out), and the modules that implement them:
 *   POSITION     an append names its first position: what is there is skipped, a gap is refused. (runs/log.py, bus/runs.lua)
 *   FENCE        an append after the end is refused; the owner then stops. (runs/log.py, bus/runs.lua)
 *   KEEP         the owner keeps items until they were taken, and appends them again. (runs/shared.py)
 *   KEEP_END     the owner keeps the end for a while. (runs/shared.py)
 *   STORED       readers get only what the store has. (server/durable.py)
 *   REPLICATED   readers get only what the replica has, too: WAIT. (bus/runs.py)
 *   CURRENT      `taken` counts only with the newest attachment. (runs/log.py, bus/runs.lua)
 *   TAKEN_AGAIN  the process of a reader sends its report again while the store has less. (runs/shared.py)
 *   ATTACH_AGAIN after a failover the newest attachment is the newest again before `taken` counts. (runs/shared.py)
 *   STATE        the owner reads in the store what was taken. A single message may be lost. (runs/shared.py)
 *   GRACE        an owner is lost only if its sign was missing for so long that it would have renewed it. (runs/shared.py)
 *   DISOWN       an owner that finds a run in the store which it does not run any more writes the end. (runs/shared.py)
 *   AHEAD        a reader ahead of the log waits while no end is written. (runs/log.py, bus/runs.lua)
 */

#ifndef TOTAL
#define TOTAL 2         /* items of the run */
#endif
#define BOUND 1         /* items that may wait to be taken */
#define SIZE 6          /* room for what goes wrong */

#ifndef CUTS
#define CUTS 0
#endif
#ifndef LOSSES
#define LOSSES 0
#endif
#ifndef FAILOVERS
#define FAILOVERS 0
#endif
#ifndef PAUSES
#define PAUSES 0
#endif
#ifndef KILLS
#define KILLS 0
#endif

#define NONE 0
#define RESULT 1
#define LOST 2

#define OK 0
#define GAP 1
#define FENCED 2

#define RUNS 0
#define PAUSED 1
#define DEAD 2

typedef Log {
    byte item[SIZE];
    byte length;
    byte first;
    byte end;
    byte attachment;
    bit has_sign
};

Log store;
Log replica;

byte cuts = CUTS;
byte losses = LOSSES;
byte failovers = FAILOVERS;
byte pauses = PAUSES;
byte kills = KILLS;

/* The owner. */
byte state;
byte produced;
byte base;              /* the first item of which it has a copy */
byte stored;            /* as far as it has heard */
byte known;             /* taken, as far as it has heard */
bit end_stored;
bit is_fenced;
bit is_done;            /* has forgotten the run */
bit must_send;
bit was_paused;

/* Its append, and an earlier one of a lost connection that is still on its way. */
bit has_append;
bit has_late;
byte late_first;
byte late_last;
bit late_end;

/* The readers. */
byte position[2];
byte saved[2];          /* what it does not need again */
byte attached[2];       /* its attachment, 0 without one */
byte newest;            /* attachment of all */
byte seen_end;
byte was_taken;         /* the first item that no reader has taken, also where the store has lost that */
bit has_taken[2];       /* a report is on its way, */
byte taken[2];          /* of this position, */
byte taken_by[2];       /* with this attachment */

byte reply;
byte k;

#define owns (!is_fenced && !is_done)
#define has_returned (produced == TOTAL)

inline append(first, last, with_end) {
    reply = OK;
    if
#ifdef FENCE
    :: store.end != NONE && !(store.end == RESULT && with_end && store.length == last) -> reply = FENCED
#endif
#ifdef POSITION
    :: else -> k = store.length;
        if
        :: first > store.length -> reply = GAP
        :: else
        fi
#else
    :: else -> k = first
#endif
    fi;
    if
    :: reply == OK ->
        assert(store.end == NONE || (k >= last && (!with_end || store.end == RESULT)));     /* nothing after the end */
        do
        :: k < last -> assert(store.length < SIZE); store.item[store.length] = k; store.length++; k++
        :: else -> break
        od;
        if
        :: with_end && store.end == NONE -> store.end = RESULT
        :: else
        fi
    :: else
    fi;
    k = 0
}

inline answered(last, with_end) {
    if
    :: reply == FENCED -> is_fenced = 1
    :: reply == GAP ->
        stored = store.length;
        if
        :: store.length < base ->   /* begin the log again behind what was taken */
            store.length = base; store.first = base; stored = base
        :: else
        fi;
        must_send = 1
    :: else ->
        stored = last;
        end_stored = end_stored || with_end;
#ifdef STATE
        known = (store.first > known -> store.first : known);
#endif
#ifdef KEEP
        base = known
#else
        base = stored
#endif
    fi;
    reply = OK
}

inline copy(to, from) {
    for (k : 0 .. TOTAL - 1) { to.item[k] = from.item[k] }
    k = 0;
    to.length = from.length; to.first = from.first; to.end = from.end; to.attachment = from.attachment;
    to.has_sign = from.has_sign
}

#define differ (store.length != replica.length || store.first != replica.first || store.end != replica.end || \
    store.attachment != replica.attachment || store.has_sign != replica.has_sign)

proctype Owner() {
end:    do
    :: atomic { state == RUNS && owns && !has_returned && produced - known < BOUND -> produced++ }
    :: atomic {
        state == RUNS && owns && !has_append && (stored < produced || (has_returned && !end_stored) || must_send) ->
        has_append = 1; must_send = 0
       }
    :: atomic { has_append && state != DEAD -> has_append = 0; append(stored, produced, has_returned); answered(produced, has_returned) }
#ifdef STATE
    :: atomic { state == RUNS && owns && store.first > known && store.first <= stored -> known = store.first }
#endif
    :: atomic { state == RUNS && !store.has_sign -> store.has_sign = 1 }
    :: atomic { state != RUNS && store.has_sign -> store.has_sign = 0 }     /* it expires */
#ifdef KEEP_END
    /* The end is kept for longer than a replica lags. */
    :: atomic { state == RUNS && owns && end_stored && replica.end == RESULT -> is_done = 1 }
#else
    :: atomic { state == RUNS && owns && end_stored -> is_done = 1 }
#endif
#ifdef DISOWN
    :: atomic { state == RUNS && !owns && store.end == NONE -> assert(!is_done); store.end = LOST }
#endif
    od
}

/* Any other process. */
proctype Judge() {
end:    do
#ifdef GRACE
    :: atomic { store.end == NONE && !store.has_sign && state != RUNS -> store.end = LOST }
#else
    :: atomic { store.end == NONE && !store.has_sign -> assert(state != RUNS || was_paused); store.end = LOST }
#endif
    od
}

#ifdef REPLICATED
#define visible (store.length < replica.length -> store.length : replica.length)
#define visible_end (replica.end == store.end && store.end != NONE)
#else
#define visible store.length
#define visible_end (store.end != NONE)
#endif
#define is_current (attached[me] && store.attachment == attached[me])

inline report(to) {
    has_taken[me] = 1; taken[me] = to; taken_by[me] = attached[me]
}

proctype Reader(bit me) {
end:    if
    :: me == 0
    :: atomic { me == 1 && newest > 0 -> position[1] = saved[0]; saved[1] = saved[0] }     /* resumes elsewhere */
    fi;
    do
    :: atomic {
        !attached[me] && position[me] >= was_taken &&
#ifdef AHEAD
        (position[me] <= store.length || store.end != NONE) ->
#else
        true ->
#endif
        assert(position[me] <= store.length);       /* OUT_OF_RANGE for items that it has had */
        newest++; attached[me] = newest; store.attachment = newest
      }
    :: atomic { !attached[me] && position[me] < was_taken -> break }        /* OUT_OF_RANGE: others have taken them */
    :: atomic { attached[me] && !is_current && attached[me] != newest -> break }    /* resumed elsewhere */
    :: atomic {
        is_current && position[me] < store.first ->
        assert(attached[me] != newest);     /* dropped, though the newest reader needs it */
        break
      }
    :: atomic {
        is_current && position[me] >= store.first && position[me] < visible ->
        assert(store.item[position[me]] == position[me]);
        position[me]++
      }
    :: atomic {
        is_current && visible_end && position[me] >= store.length ->
        assert(position[me] == store.length);
        assert(seen_end == NONE || seen_end == store.end);
        seen_end = store.end;
        break
      }
#ifndef STORED
    :: atomic { me == 0 && is_current && state == RUNS && owns && position[0] < produced -> position[0]++ }
#endif
    :: atomic { attached[me] && position[me] > saved[me] && !has_taken[me] -> saved[me] = position[me]; report(saved[me]) }
#ifdef TAKEN_AGAIN
    :: atomic { is_current && saved[me] > store.first && saved[me] <= store.length && !has_taken[me] -> report(saved[me]) }
#endif
    :: atomic { cuts > 0 && attached[me] -> cuts--; attached[me] = 0;
        if
        :: position[me] = saved[me]     /* the client has restarted */
        :: skip
        fi
      }
    od
}

/* Reports of readers on their way to the store. */
proctype Reports(bit me) {
end:    do
    :: atomic { has_taken[me] ->
        has_taken[me] = 0;
        taken[me] = (taken[me] > store.length -> store.length : taken[me]);
        if
#ifdef CURRENT
        :: taken[me] > store.first && taken_by[me] == store.attachment ->
#else
        :: taken[me] > store.first ->
#endif
            store.first = taken[me];
            was_taken = (taken[me] > was_taken -> taken[me] : was_taken);
#ifndef STATE
            if
            :: known = (store.first > known -> store.first : known)
            :: skip
            fi
#endif
        :: else
        fi
      }
    od
}

proctype Faults() {
end:    do
    :: atomic { differ -> copy(replica, store) }
    :: atomic {
        failovers > 0 && differ ->
        failovers--;
        copy(store, replica);
        has_append = 0; has_late = 0;
        store.has_sign = 0;     /* it has expired */
        must_send = !is_done; end_stored = end_stored && is_done;
#ifdef ATTACH_AGAIN
        store.attachment = newest
#endif
      }
    :: atomic {
        losses > 0 && has_append && !has_late ->
        losses--;
        late_first = stored; late_last = produced; late_end = has_returned; has_late = 1;
        has_append = 0; must_send = 1
      }
    :: atomic { has_late -> has_late = 0; append(late_first, late_last, late_end); reply = OK }
    :: atomic { pauses > 0 && state == RUNS -> pauses--; state = PAUSED; was_paused = 1 }
    :: atomic { state == PAUSED -> state = RUNS }
    :: atomic { kills > 0 && state == RUNS -> kills--; state = DEAD; has_append = 0 }
    od
}

init {
    atomic {
        run Owner(); run Judge(); run Reader(0); run Reader(1); run Reports(0); run Reports(1); run Faults()
    }
}
