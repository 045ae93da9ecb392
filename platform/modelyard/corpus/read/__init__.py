"""Readers: from raw files to tables of documents, with every record that cannot be read set aside.

`units` cuts the input into fixed portions of work, `streams` inflates and splits bytes, `formats` knows
the file formats, `docstrings` mines Python sources, `documents` turns records into Arrow tables.
"""
