"""The models, one folder a paper; each is a subclass of :class:`scvi.model.base.BaseModelClass`."""
