"""Types of options that click does not bring."""

from datetime import timedelta

import click

from schemas.streams import parse_duration


class DurationType(click.ParamType[timedelta]):
    """`30s`, `5m`, `2h`, `1d`."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        """Read a duration or fail with an example."""
        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
