"""Measurements of attnfuse against stock `torch.compile`: `python -m benchmarks` runs them, `--help` says how.

A case first compares results with the original model (`gate`); what is wrong has no speed.  Its variants live in processes of their
own (`worker`) and run in turn; a figure is the median over the turns with a bootstrap interval (`stats`), and a target is met
when the interval's worse end meets it.  `cases` is the list of what is measured.
"""
