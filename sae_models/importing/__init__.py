"""Import SAEs that others trained as bundles, and check bundles."""

from rudder.sae_models.importing.check import check_bundle
from rudder.sae_models.importing.importer import ImportRefused, ImportRequest, ImportResult, import_sae

__all__ = ["ImportRefused", "ImportRequest", "ImportResult", "check_bundle", "import_sae"]
