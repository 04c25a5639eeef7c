//! The sssd datastore.
