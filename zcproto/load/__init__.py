"""The load generator of `zcproto bench` and `zcproto demo`: many verified connections and an open-loop load.

    command -> plan -> run -> worker => generator -> connection, pacer
                        |                   \\-> record (sent back)
                        \\-> caller (the server's counters) -> result -> report, hdr, plot

Read in this order:

plan         the parameters of a run, checked before anything is opened
run          the phases connect, load, verify and close, with the server's counters read in between
worker       the generator processes, and the pool that starts them (`processes`) and sends them commands
generator    the connections of one process and their load, on the schedule of `pacer`
record       what a process measures: latencies and outcomes, added up over all processes
caller       connections for single calls, such as the operator's, which reads `server.stats`
result       compares the counts of both sides and decides the verdict
report       figures as tables and JSON; `hdr` and `plot` write files, `progress` shows a run while it lasts
command      a run from its options to its exit code
demo         the same with a server of its own, in a process of `demo_child`
"""
