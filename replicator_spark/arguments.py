"""What both commands take."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

MASTER = "the cluster, such as spark://host:7077; local[2] is two cores of this machine; without it spark-submit's"

Master: TypeAlias = Annotated[str | None, typer.Option(metavar="URL", help=MASTER)]
Conf: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="a setting of Spark, spark.executor.memory=1g; can be repeated"),
]
