"""Document tasks for stage 2: BigDocs rows stored as json beside their images, or shards in the sample schema."""

from .base import WebDataModule
from .shards.sample_formats import Adapter, read_bigdocs


class BigDocsDataModule(WebDataModule):
    """BigDocs: `{key}.json` with the columns of the hub's configs and `{key}.0.png`, …; or the sample schema.

    The columns differ between BigDocs configs (`sample_id` or `identifier`, `query` or `queries`); an unknown
    schema is an error, never a guess. Several queries of one image become several turns. The test and
    validation splits of its TabFact and WikiTQ configs are benchmarks of the paper: keep them out of `train`.
    """

    def adapter(self) -> Adapter:
        """Read BigDocs columns."""
        return read_bigdocs
