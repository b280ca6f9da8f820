"""ps, hb, status, version, help: what a person and a program see."""

from __future__ import annotations

import json

from conftest import Command  # the one beside this file
