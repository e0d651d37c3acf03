"""A server under everything at once, for a long time: whether it grows, and whether an answer is ever wrong.

`clients` churn and judge every answer, `harm` rotates, reloads and fills the disk, `watch` takes samples at rest,
`outcome` says what they prove, `run` conducts, `plot` draws.
"""
