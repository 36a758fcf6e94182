"""Pictures under names, and whose a picture is; docs/gallery.md.

gallery   enrol, identify, verify, remove     store     what is on the disk: who decides, and what is durable
copies    re-embedding, export                vectors   the file of embeddings
"""

from siamese_deploy.gallery.gallery import Candidate, Enrolment, Gallery, Identification, check_name, twins

__all__ = ["Candidate", "Enrolment", "Gallery", "Identification", "check_name", "twins"]
