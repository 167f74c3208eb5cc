"""``import soap_opt.integrations.compressai`` puts "SOAP" into CompressAI's optimizer registry.

>>> import soap_opt.integrations.compressai
>>> from compressai.optimizers import net_aux_optimizer
>>> conf = {"net": {"type": "SOAP", "lr": 1e-3}, "aux": {"type": "Adam", "lr": 1e-3}}
>>> optimizers = net_aux_optimizer(net, conf)  # doctest: +SKIP

``net_aux_optimizer`` keeps the entropy bottlenecks' ``.quantiles`` apart; they stay with the auxiliary Adam.
"""

from compressai.registry import register_optimizer

from soap_opt.soap import SOAP

register_optimizer("SOAP")(SOAP)
