"""Data formats, one file per format, found by name: files, folders, named data sets and the hub."""

from cmai_fast.data.formats.format import FORMATS, Format, data_format, digest_of, format_of_suffix, read_text

__all__ = ["FORMATS", "Format", "data_format", "digest_of", "format_of_suffix", "read_text"]
