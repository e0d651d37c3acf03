/* A model of the first OPEN of a durable run: it is repeated, while the run may end and make room for others.
 * README.md says how to check it.
 *
 * Time passes in ticks. The id of a run that has gone stays known for KNOWN ticks. The client repeats the first OPEN, with
 * params, until it has received ACCEPTED, for at most REPEATED ticks after the first; then it attaches with nil params.
 *
 * Property: the method runs at most once.
 *
 * Rules (each can be left out), and the modules that implement them:
 *   TOMBSTONE    the id of a run that has gone stays known for a while. (runs/log.py, bus/runs.lua)
 *   LIMITED      a client repeats a first OPEN for a shorter time than that. (client/streams.py)
 *   ATTACHES     a client that has received ACCEPTED attaches with nil params, which start nothing. (client/streams.py)
 */

#define KNOWN 2
#define REPEATED 1
#define TICKS 5
#define LOSSES 2

#define UNKNOWN 0
#define KEPT 1
#define GONE 2

byte run_state;
byte gone_for;
byte started;
byte now;
byte losses = LOSSES;

bit is_sent;            /* the OPEN is on its way, */
bit with_params;        /* and may start the run */
bit is_accepted;        /* the client has received ACCEPTED */
bit has_tried;
byte first_at;

proctype Client() {
end:    do
    :: atomic {
        !is_sent && now < TICKS &&
#ifdef LIMITED
        (is_accepted || !has_tried || now <= first_at + REPEATED) ->
#else
        true ->
#endif
        first_at = (has_tried -> first_at : now);
        has_tried = 1;
        is_sent = 1;
#ifdef ATTACHES
        with_params = !is_accepted
#else
        with_params = 1
#endif
      }
    od
}

proctype Server() {
end:    do
    :: atomic { is_sent ->
        is_sent = 0;
        if
        :: run_state == UNKNOWN && with_params -> run_state = KEPT; started++; assert(started < 2)
        :: else
        fi;
        if
        :: run_state == KEPT -> is_accepted = 1
        :: losses > 0 -> losses--       /* the connection is lost with the answer */
        :: else
        fi
      }
    :: atomic { is_sent && losses > 0 -> losses--; is_sent = 0 }
    :: atomic { run_state == KEPT -> gone_for = 0;
#ifdef TOMBSTONE
        run_state = GONE
#else
        run_state = UNKNOWN
#endif
      }
    od
}

/* An OPEN reaches the server within a tick, or is lost with its connection. */
proctype Clock() {
end:    do
    :: atomic { now < TICKS && !is_sent ->
        now++;
        if
        :: run_state == GONE && gone_for >= KNOWN -> run_state = UNKNOWN
        :: run_state == GONE && gone_for < KNOWN -> gone_for++
        :: else
        fi
      }
    od
}

init {
    atomic { run Client(); run Server(); run Clock() }
}
