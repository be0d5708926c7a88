"""Evaluation of denoisers on clean images or pairs: protocol, figures, pictures, page. No Ray.

    protocol.py    noise as the literature adds it, and the measures of one result
    sources.py     DATA -> one `Shot` for each image: files, IDX files, pairs
    methods.py     models and classical filters behind one call; codes of a model's bottleneck
    rows.py        the row schema and its Parquet table
    statistics.py  means with confidence intervals, rankings, PCA, warnings
    examples.py    crops of the images that the pictures show
    pictures.py    figures as PNG, by matplotlib
    page.py        one self-contained HTML page
    publish.py     table, pictures, page and summary, written at the end

`pipelines/evaluate.py` runs them over Ray Data; `python -m jobs.evaluate` is the command.
"""
