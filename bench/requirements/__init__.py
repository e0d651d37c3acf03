"""Every requirement, measured or shown by tests in one command: `python -m bench requirements`.

    requirement   what must hold: each row's text and target, and how it is shown
    finding       what was found for one row, and the verdict
    sizes         how much is measured
    measures      rows that are figures, by the measurements of this folder
    marked_tests  rows that are shown by tests: `pytest -m requirement`
    run           the steps, and the rows that each fills
    table, plots  how it is shown: on a terminal, as Markdown, as HTML, as JSON, drawn

A row is filled by this run alone; a row without a finding fails.
"""
