"""The load generator: many verified connections, an open-loop load, and what both ends counted.

    plan -> run -> workers (worker -> generator -> link) -> result -> report, hdr, plot
             \\-> operator (the server's own figures)

`plan` decides what is asked and refuses what cannot be measured. `run` conducts: it starts the generator
processes, reads the server's own count between the phases, and gathers. A `worker` is a process with a
`generator`, which holds the connections (`link`) and keeps the schedule (`pacer`, `schedule`). `result` says what
was proven and what was not; `report`, `hdr` and `plot` only show it.
"""
