"""The report: one page of HTML that shows a run, from the files in its folder or from a learner.

`command` is the program ``flowtrain``. `folder` finds the runs in a folder, and `logs` reads the logs in it. Both fill
the `Findings` of a run, which are in `findings` and can also be those of a learner. `charts` draws their series with
bokeh, and `page` writes the page.
"""

__all__: list[str] = []
