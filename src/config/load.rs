//! Reading the sources, in order, and turning what is wrong with them into one clear error.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use figment::providers::{Format, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};

use super::{Config, range};

/// The file that is read when neither `--config` nor `SANDBAR_CONFIG` names one. It may be missing.
const DEFAULT_FILE: &str = "sandbar.toml";

/// What every environment variable of ours starts with.
const ENV_PREFIX: &str = "SANDBAR_";

/// Names the configuration file.
const ENV_CONFIG_FILE: &str = "SANDBAR_CONFIG";

/// The one setting outside of a section.
const ENV_DATA_DIR: &str = "SANDBAR_DATA_DIR";

/// Sections, to recognise a variable with one underscore where two belong.
const SECTIONS: [&str; 11] = [
    "database",
    "server",
    "rate_limits",
    "quotas",
    "secrets",
    "worker",
    "egress",
    "capabilities",
    "scheduler",
    "compile",
    "log",
];

/// Keys whose values are texts: a password of digits in a variable must not become a number.
const TEXT_KEYS: [&str; 13] = [
    "scheduler.export_dir",
    "database.url",
    "database.api_url",
    "database.worker_url",
    "server.listen",
    "server.admin_key",
    "server.tls_cert",
    "server.tls_key",
    "secrets.master_key",
    "secrets.master_key_file",
    "log.format",
    "log.filter",
    "data_dir",
];

/// Largest configuration file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// What flags say; each `Some` wins over every other source.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Overrides {
    /// `--config`: the file to read. It must exist.
    pub config_file: Option<PathBuf>,
    /// `data_dir`.
    pub data_dir: Option<PathBuf>,
    /// `database.url`.
    pub database_url: Option<super::Secret>,
    /// `database.api_url`.
    pub api_url: Option<super::Secret>,
    /// `database.worker_url`.
    pub worker_url: Option<super::Secret>,
    /// `server.listen`.
    pub listen: Option<SocketAddr>,
    /// `worker.slots`.
    pub slots: Option<u32>,
    /// `worker.cells`.
    pub cells: Option<u32>,
    /// `log.format`.
    pub log_format: Option<super::LogFormat>,
    /// `log.filter`.
    pub log_filter: Option<String>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The configuration file could not be read.
    #[error("cannot read configuration file {path}: {source}", path = path.display())]
    File {
        /// The file that was to be read.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A source has an unknown key, or a value of the wrong type; the text names key and source.
    #[error("configuration: {0}")]
    Source(String),
    /// An environment variable that looks like a setting but is none.
    #[error("environment variable {name} is no setting; did you mean {meant}?")]
    Variable {
        /// The variable as it is set.
        name: String,
        /// The name that would be understood.
        meant: String,
    },
    /// Values that are out of range or contradict each other.
    #[error("configuration: {}", problems.join("; "))]
    Invalid {
        /// One sentence for each.
        problems: Vec<String>,
    },
}

impl Config {
    /// Reads all sources and checks the result.
    ///
    /// # Errors
    /// When the file named by flag or variable cannot be read, a key is unknown, a value has the wrong type or
    /// lies outside of its range.
    pub fn load(overrides: &Overrides) -> Result<Self, ConfigError> {
        // Variables that are not UTF-8 cannot be ours to read; names of ours with such a value are refused.
        let mut variables = Vec::new();
        for (name, value) in std::env::vars_os() {
            let Some(name) = name.to_str().filter(|name| name.starts_with(ENV_PREFIX)) else { continue };
            let value = value
                .into_string()
                .map_err(|_| ConfigError::Source(format!("environment variable {name} is not UTF-8")))?;
            variables.push((name.to_owned(), value));
        }
        Self::load_from(overrides, &variables, Path::new(DEFAULT_FILE))
    }

    /// [`Config::load`] with the environment and the default file given: what tests call.
    pub(super) fn load_from(
        overrides: &Overrides,
        variables: &[(String, String)],
        default_file: &Path,
    ) -> Result<Self, ConfigError> {
        let named = overrides.config_file.clone().or_else(|| {
            variables
                .iter()
                .find(|(name, value)| name == ENV_CONFIG_FILE && !value.is_empty())
                .map(|(_, value)| value.into())
        });
        let mut figment = Figment::new();
        if let Some((path, text)) = read_file(named.as_deref(), default_file)? {
            figment = figment.merge(Layer::parse(&path, &text)?);
        }
        for (name, text) in variables {
            if let Some(key) = key_of(name)? {
                figment = figment.merge(Layer::variable(name, &key, text));
            }
        }
        let mut config: Self = figment.extract().map_err(|error| ConfigError::Source(describe(error)))?;
        overrides.apply(&mut config);
        config.source = overrides.clone();
        range::validate(&config)?;
        Ok(config)
    }
}

impl Config {
    /// The same sources, read again.
    ///
    /// # Errors
    /// As [`Config::load`]; what was read before stays as it is.
    pub fn reload(&self) -> Result<Self, ConfigError> {
        Self::load(&self.source)
    }
}

impl Overrides {
    fn apply(&self, config: &mut Config) {
        fn set<T: Clone>(to: &mut T, from: Option<&T>) {
            if let Some(value) = from {
                *to = value.clone();
            }
        }
        set(&mut config.data_dir, self.data_dir.as_ref());
        if self.database_url.is_some() {
            config.database.url.clone_from(&self.database_url);
        }
        if self.api_url.is_some() {
            config.database.api_url.clone_from(&self.api_url);
        }
        if self.worker_url.is_some() {
            config.database.worker_url.clone_from(&self.worker_url);
        }
        set(&mut config.server.listen, self.listen.as_ref());
        set(&mut config.worker.slots, self.slots.as_ref());
        set(&mut config.worker.cells, self.cells.as_ref());
        set(&mut config.log.format, self.log_format.as_ref());
        set(&mut config.log.filter, self.log_filter.as_ref());
    }
}

/// The text of the file to read: the named one, which must exist, or the default one if it does.
fn read_file(named: Option<&Path>, default_file: &Path) -> Result<Option<(PathBuf, String)>, ConfigError> {
    use std::io::Read as _;
    let path = named.unwrap_or(default_file);
    let fail = |source| ConfigError::File { path: path.to_owned(), source };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error)),
    };
    let mut text = String::new();
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(fail)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(fail(std::io::Error::other(format!("larger than {MAX_FILE_BYTES} bytes"))));
    }
    Ok(Some((path.to_owned(), text)))
}

/// One source of values with the name that errors give it.
struct Layer {
    name: String,
    values: Dict,
}

impl Layer {
    fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        let values = Toml::from_str(text).map_err(|error| ConfigError::Source(format!("{name}: {error}")))?;
        Ok(Self { name, values })
    }

    fn variable(name: &str, key: &str, text: &str) -> Self {
        let value = if TEXT_KEYS.contains(&key) {
            Value::from(text)
        } else {
            // The same reading of numbers as in the file; never fails, what is no number is a text.
            text.parse().unwrap_or_else(|never| match never {})
        };
        let values = figment::util::nest(key, value).into_dict().unwrap_or_default();
        Self { name: format!("environment variable {name}"), values }
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name.clone()).interpolater(|_, keys| keys.join("."))
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Map::from([(Profile::Default, self.values.clone())]))
    }
}

/// The key that a variable sets; `None` for variables that belong to a command (`SANDBAR_CONFIG`, …).
fn key_of(variable: &str) -> Result<Option<String>, ConfigError> {
    let Some(rest) = variable.strip_prefix(ENV_PREFIX) else { return Ok(None) };
    if variable == ENV_DATA_DIR {
        return Ok(Some("data_dir".to_owned()));
    }
    let key = rest.to_ascii_lowercase();
    if key.contains("__") {
        return Ok(Some(key.replace("__", ".")));
    }
    let slip = SECTIONS.iter().find_map(|section| {
        key.strip_prefix(section)?
            .strip_prefix('_')
            .map(|field| format!("{section}__{field}").to_ascii_uppercase())
    });
    match slip {
        Some(meant) => {
            Err(ConfigError::Variable { name: variable.to_owned(), meant: format!("{ENV_PREFIX}{meant}") })
        }
        None => Ok(None),
    }
}

/// One line per fault: which key, what is wrong with it, and in which source.
fn describe(error: figment::Error) -> String {
    let mut lines = Vec::new();
    for fault in error {
        let mut line = String::new();
        if !fault.path.is_empty() {
            line.push_str(&fault.path.join("."));
            line.push_str(": ");
        }
        line.push_str(&fault.kind.to_string());
        if let Some(source) = &fault.metadata {
            line.push_str(" (in ");
            line.push_str(&source.name);
            line.push(')');
        }
        lines.push(line);
    }
    lines.join("; ")
}
