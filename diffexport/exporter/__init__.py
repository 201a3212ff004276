"""Module and spec to graphs to bundle. Needs the extra ``[export]``."""
