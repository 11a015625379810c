"""A picture inside a zip archive, read on use."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class ZippedPicture:
    """A member of a zip archive, as a file for `read_picture`.

    The archive is opened at each `read`, so that processes that share the object do not share a file position.
    """

    archive: str
    member: str

    @property
    def name(self) -> str:
        """As in errors."""
        return f"{self.archive}/{self.member}"

    def read(self) -> bytes:
        """The bytes of the picture.

        Raises:
            ValueError: the archive or the member is missing or damaged.
        """
        try:
            with zipfile.ZipFile(self.archive) as archive:
                return archive.read(self.member)
        except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{self.name} cannot be read ({error}); expected a complete zip archive") from error
