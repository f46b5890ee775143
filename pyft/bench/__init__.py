"""The harness that `pyft bench` and benchmarks/ share.

    shapes     real layers of models, as data
    problem    what is measured: a case, its variants, who runs it, and what a right answer is
    problems/  one file per family of ops; the registry OPS is keyed by op name
    peers      other libraries, used where they are installed
    timing     interleaved timing, ratios and their spread
    memory     peak memory of one call, as a difference
    run        check, measure and time every case within a budget
    report     JSON, Markdown and a table; plot draws the chart

A wrong answer is never timed.
"""
