//! The key-values of a log record as text, for the host and for tests alike.

use log::kv::{self, VisitSource};

/// The key-values in the order in which the record gives them.
pub(crate) fn fields(record: &log::Record<'_>) -> Vec<(String, String)> {
    let mut fields = Fields(Vec::new());
    // `Fields` never fails; a source that does has given what it could.
    let _ = record.key_values().visit(&mut fields);
    fields.0
}

struct Fields(Vec<(String, String)>);

impl<'kvs> VisitSource<'kvs> for Fields {
    fn visit_pair(&mut self, key: kv::Key<'kvs>, value: kv::Value<'kvs>) -> Result<(), kv::Error> {
        self.0.push((key.to_string(), value.to_string()));
        Ok(())
    }
}
