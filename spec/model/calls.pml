/* A model of a pending call: two clients of the user, one of which may be a thief with an old token, answer at any time.
 * README.md says how to check it.
 *
 * The session rotates its token once; a client shows the newest one or has the old one. The call is in the process of the
 * method that asks, and ends with its deadline, or with that process. An answer passes two steps on its way: a client
 * sends it, then it is decided.
 *
 * Properties:
 * - The call has one result. Nothing changes it, and nothing answers a call that has expired or whose method has gone.
 * - No answer of a client counts whose token was replaced before the decision, or whose session has ended.
 * - While a client with the newest token is connected and answers, and the deadline has not passed, the call is answered.
 *
 * Rules (each can be left out), and the modules that implement them:
 *   ONE_STEP   the answer is accepted, the call ended and the token checked in one step. (server/pending.py)
 *   NEWEST     only a client that has shown the newest token of a session that lives may answer. (server/pending.py)
 *   DEADLINE   an answer after the deadline is dropped. (server/pending.py)
 *   WITH_OWNER the call ends with the process of the method. (server/pending.py)
 *   AGAIN      a client that connects, or cannot answer now, gets the call again. (server/pending.py)
 */

#define OPEN 0
#define ANSWERED 1
#define EXPIRED 2
#define ENDED 3

byte call;
byte answers;
bit has_passed;         /* the deadline */
bit is_gone;            /* the process of the method */
bit has_rotated;
bit is_revoked;
bit shows_newest[2] = 1;
bit is_offered[2];
bit has_answer[2];      /* is on its way */
bit is_checked[2];
byte cuts = 2;
byte refusals = 1;

#define may_answer(me) (shows_newest[me] && !is_revoked)

inline decide(me) {
    has_answer[me] = 0; is_checked[me] = 0;
    assert(may_answer(me));
    assert(!has_passed && !is_gone);
    answers++;
    assert(answers == 1);
    call = ANSWERED
}

proctype Client(bit me) {
end:    do
    :: atomic { is_offered[me] && !has_answer[me] && call == OPEN -> has_answer[me] = 1; is_offered[me] = 0 }
    :: atomic { cuts > 0 && is_offered[me] -> cuts--; is_offered[me] = 0 }      /* and connects again */
    :: atomic { refusals > 0 && is_offered[me] -> refusals--; is_offered[me] = 0 }
    :: atomic { has_rotated && !shows_newest[me] && me == 0 -> shows_newest[0] = 1 }
    od
}

#ifdef NEWEST
#define counts(me) may_answer(me)
#else
#define counts(me) true
#endif

#ifdef DEADLINE
#define in_time (!has_passed)
#else
#define in_time true
#endif

#ifdef WITH_OWNER
#define has_owner (!is_gone)
#else
#define has_owner true
#endif

bit was_offered[2];

proctype Server(bit me) {
end:    do
    :: atomic {
        call == OPEN && in_time && has_owner && !is_offered[me] && !has_answer[me] && counts(me) &&
#ifdef AGAIN
        true ->
#else
        !was_offered[me] ->
#endif
        is_offered[me] = 1; was_offered[me] = 1
      }
#ifdef ONE_STEP
    :: atomic { has_answer[me] && call == OPEN && counts(me) && in_time && has_owner -> decide(me) }
#else
    :: atomic { has_answer[me] && call == OPEN && counts(me) && in_time && has_owner -> is_checked[me] = 1 }
    :: atomic { is_checked[me] -> decide(me) }
#endif
    :: atomic { has_answer[me] && !is_checked[me] && !(call == OPEN && counts(me) && in_time && has_owner) -> has_answer[me] = 0 }
    od
}

proctype World() {
end:    do
    :: atomic { !has_passed -> has_passed = 1 }
    :: atomic { has_passed && call == OPEN -> call = EXPIRED }
    :: atomic { !is_gone -> is_gone = 1 }
    :: atomic { is_gone && call == OPEN -> call = ENDED }
    :: atomic { !has_rotated -> has_rotated = 1; shows_newest[0] = 0; shows_newest[1] = 0 }
    :: atomic { !is_revoked -> is_revoked = 1 }
    od
}

/* The method: with LIVES nothing but the clients ends the call, which must then be answered. */
proctype Method() {
    call != OPEN
}

init {
    atomic {
        run Client(0); run Client(1); run Server(0); run Server(1); run Method();
#ifdef LIVES
        if
        :: has_rotated = 1; shows_newest[0] = 0; shows_newest[1] = 0
        :: skip
        fi
#else
        run World()
#endif
    }
}
