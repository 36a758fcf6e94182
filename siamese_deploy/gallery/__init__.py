"""Pictures under names, and whose a picture is; docs/gallery.md.

gallery   enrol, identify, verify, remove     store     what is on the disk: who decides, and what is durable
search    the order of answers; likely rows   vectors   the file of embeddings
copies    re-embedding, export
"""

from siamese_deploy.gallery.gallery import Enrolment, Gallery, Identification, check_name, twins
from siamese_deploy.gallery.search import Candidate

__all__ = ["Candidate", "Enrolment", "Gallery", "Identification", "check_name", "twins"]
