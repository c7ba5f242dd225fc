//! What of a guest's calls is sealed at rest, and by which key. Cells see none of it. Owns when: the installation or the
//! tenant wants it now, or the invocation that asks is sealed itself.

use std::sync::Arc;

use sandbar_host::capability::call::Refusal;
use sha2::{Digest, Sha256};
use tracing::warn;

use super::{Asker, unavailable};
use crate::app::sealed::keys::Keys;
use crate::app::sealed::task::{Place, TaskSealer};
use crate::app::sealed::{Part, Sealer};
use crate::app::vault::{DataKey, VaultError};
use crate::domain::ids::StartId;
use crate::store::queue::Withheld;
use crate::store::start;
use crate::store::task::Setting;

/// A data key with its fingerprint.
type Named = (String, DataKey);

/// Seals and opens for one attempt.
pub(super) struct Seals {
    pub(super) keys: Arc<Keys>,
    pub(super) asker: Asker,
    /// The installation wants everything sealed.
    pub(super) all: bool,
}

/// What is asked for, as it is written down.
pub(super) struct SealedStart {
    pub(super) id: StartId,
    pub(super) input: Vec<u8>,
    pub(super) sealed: Option<String>,
    pub(super) hashes: Vec<Vec<u8>>,
}

fn withheld(why: Withheld) -> Refusal {
    Refusal::failed(match why {
        Withheld::NoKey => "it is sealed or must be, and this worker does not have the key: see its log",
        Withheld::Erased => "the key that it was sealed by has been erased: write it anew",
        Withheld::Broken => "what is stored does not open: it was changed or moved",
    })
}

fn broken(error: &VaultError) -> Refusal {
    warn!(%error, "what a task keeps does not open");
    withheld(Withheld::Broken)
}

impl Seals {
    /// What seals that which is written now; `None`: nobody wants it sealed.
    pub(super) async fn key(&self) -> Result<Option<Named>, Refusal> {
        let tenant = self.asker.tenant;
        let wanted = self.all
            || self.asker.attempt.claim.is_sealed()
            || self.keys.wants_sealed(tenant).await.map_err(|error| unavailable(&error))?;
        if !wanted {
            return Ok(None);
        }
        let key = self.keys.current_or_new(tenant).await.map_err(|error| unavailable(&error))?;
        key.map(Some).map_err(|why| {
            warn!(%tenant, ?why, "there is no key for what must be sealed");
            withheld(why)
        })
    }

    /// The key with this fingerprint.
    pub(super) async fn opener(&self, id: &str) -> Result<DataKey, Refusal> {
        let key = self.keys.by_id(self.asker.tenant, id).await;
        key.map_err(|error| unavailable(&error))?.map_err(withheld)
    }

    fn task<'a>(&self, key: &'a DataKey) -> TaskSealer<'a> {
        TaskSealer::new(key, self.asker.tenant, self.asker.task)
    }

    /// A value as it is stored.
    pub(super) fn seal(
        &self,
        with: Option<&Named>,
        place: Place<'_>,
        plain: &[u8],
    ) -> Result<Vec<u8>, Refusal> {
        match with {
            Some((_, key)) => self.task(key).seal(place, plain).map_err(|error| broken(&error)),
            None => Ok(plain.to_vec()),
        }
    }

    /// A value as it was.
    pub(super) fn open(&self, key: &DataKey, place: Place<'_>, sealed: &[u8]) -> Result<Vec<u8>, Refusal> {
        self.task(key).open(place, sealed).map_err(|error| broken(&error))
    }

    /// A text of the configuration as it was set.
    pub(super) async fn setting(&self, name: &str, setting: Setting) -> Result<String, Refusal> {
        match setting {
            Setting::Plain(text) => Ok(text),
            Setting::Sealed { sealed, data } => {
                let key = self.opener(&sealed).await?;
                self.task(&key).open_setting(name, &data).map_err(|error| broken(&error))
            }
        }
    }

    /// What is to be started, as it is written down. Its digest is made by the key, or it would tell whoever guesses the
    /// input that he was right; the other one is that of the same request from before, or after, it was sealed.
    pub(super) async fn start(&self, input: &[u8], key: Option<&str>) -> Result<SealedStart, Refusal> {
        let id = StartId::generate();
        let plain: [u8; 32] = Sha256::digest(input).into();
        let claim = self.asker.attempt.claim;
        Ok(match self.key().await? {
            Some((fingerprint, data_key)) => {
                let sealer = Sealer::new(&data_key, claim.tenant(), claim.invocation());
                let sealed = sealer.seal(0, Part::Start(&start::name(key, id)), input);
                SealedStart {
                    id,
                    input: sealed.map_err(|error| broken(&error))?,
                    sealed: Some(fingerprint),
                    hashes: vec![data_key.digest(&plain).to_vec(), plain.to_vec()],
                }
            }
            None => {
                let known =
                    self.keys.current(self.asker.tenant).await.map_err(|error| unavailable(&error))?;
                let mut hashes = vec![plain.to_vec()];
                hashes.extend(known.map(|(_, key)| key.digest(&plain).to_vec()));
                SealedStart { id, input: input.to_vec(), sealed: None, hashes }
            }
        })
    }
}
