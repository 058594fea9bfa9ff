"""Diagnostics: they examine a learner, or a copy of it, and do not change its training.

`strict` compares the state before and after every handler. `dry_run` runs each handler once and measures its time,
`suggest_access` runs a callback with a `recording_view` to find the access that it must declare, `sync_audit` finds
operations that make the host wait for the device, and `lr_finder` trains with growing learning rates; these four run a
copy, which `scratch_learner` makes. `history` is the table of the recorded metrics, and `plots` draws them.
`trace_file` writes the timeline of a fit, which the process of `trace_formatter` formats, and joins such files.
`report` is a page of HTML about a run, and `recording` keeps what a callback is given and runs it again.
"""

__all__: list[str] = []
