"""Every requirement, measured or checked in one command: `zcproto bench --requirements`.

    requirement   what must hold: each row's text, target and how it is found out
    finding       what was found of one row, and the verdict
    sizes         how much is measured
    homes         home folders, users, certificates and servers for checks
    *_checks      rows that are right or wrong, by what a running server does
    measures      rows that are figures, by the measurements of the rooms beside this one
    steps, run    what is done in which order, and who fills which row
    table, page, text, plots   how it is shown: on a terminal, as HTML, as Markdown, drawn

No row is filled but by what was seen in this run, and one that nobody fills is failed.
"""
