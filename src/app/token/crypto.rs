//! The cryptography below `jsonwebtoken`, by ring, which TLS uses as well: a second library of the same kind would only be
//! one more to trust. Owns which algorithms there are: Ed25519 for our own tokens; ES256, ES384, RS256, RS384, RS512 and
//! PS256 from outside. No algorithm with a shared secret: whoever could verify could sign.

use jsonwebtoken::crypto::{CryptoProvider, JwkUtils, JwtSigner, JwtVerifier};
use jsonwebtoken::errors::{ErrorKind, Result};
use jsonwebtoken::signature::{Error, Signer, Verifier};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind, EncodingKey};
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, Ed25519KeyPair, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256, RsaParameters,
    RsaPublicKeyComponents, UnparsedPublicKey, VerificationAlgorithm,
};

static PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: |algorithm, key| match algorithm {
        Algorithm::EdDSA => Ok(Box::new(Ed25519Signer::new(key)?)),
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    },
    verifier_factory: |algorithm, key| {
        let method = method(*algorithm)?;
        Ok(Box::new(AnyVerifier { algorithm: *algorithm, method, key: key.clone() }))
    },
    jwk_utils: JwkUtils::new_unimplemented(), // keys are made here, and never turned into JWKs by the library
};

/// Make it the one that is used. May be called again.
pub(super) fn install() {
    let _ = PROVIDER.install_default();
}

#[derive(Clone, Copy)]
enum Method {
    Curve(&'static dyn VerificationAlgorithm),
    Rsa(&'static RsaParameters),
}

fn method(algorithm: Algorithm) -> Result<Method> {
    Ok(match algorithm {
        Algorithm::EdDSA => Method::Curve(&ED25519),
        Algorithm::ES256 => Method::Curve(&ECDSA_P256_SHA256_FIXED),
        Algorithm::ES384 => Method::Curve(&ECDSA_P384_SHA384_FIXED),
        Algorithm::RS256 => Method::Rsa(&RSA_PKCS1_2048_8192_SHA256),
        Algorithm::RS384 => Method::Rsa(&RSA_PKCS1_2048_8192_SHA384),
        Algorithm::RS512 => Method::Rsa(&RSA_PKCS1_2048_8192_SHA512),
        Algorithm::PS256 => Method::Rsa(&RSA_PSS_2048_8192_SHA256),
        _ => return Err(ErrorKind::InvalidAlgorithm.into()),
    })
}

struct Ed25519Signer(Ed25519KeyPair);

impl Ed25519Signer {
    /// The key is its 32 bytes of seed.
    fn new(key: &EncodingKey) -> Result<Self> {
        let pair = Ed25519KeyPair::from_seed_unchecked(key.inner());
        pair.map(Self).map_err(|_| ErrorKind::InvalidEddsaKey.into())
    }
}

impl Signer<Vec<u8>> for Ed25519Signer {
    fn try_sign(&self, message: &[u8]) -> std::result::Result<Vec<u8>, Error> {
        Ok(self.0.sign(message).as_ref().to_vec())
    }
}

impl JwtSigner for Ed25519Signer {
    fn algorithm(&self) -> Algorithm {
        Algorithm::EdDSA
    }
}

struct AnyVerifier {
    algorithm: Algorithm,
    method: Method,
    key: DecodingKey,
}

impl Verifier<Vec<u8>> for AnyVerifier {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> std::result::Result<(), Error> {
        let verified = match (self.method, self.key.kind()) {
            (Method::Curve(method), DecodingKeyKind::SecretOrDer(bytes)) => {
                UnparsedPublicKey::new(method, bytes).verify(message, signature)
            }
            (Method::Rsa(method), DecodingKeyKind::RsaModulusExponent { n, e }) => {
                RsaPublicKeyComponents { n, e }.verify(method, message, signature)
            }
            _ => return Err(Error::new()),
        };
        verified.map_err(|_| Error::new())
    }
}

impl JwtVerifier for AnyVerifier {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}
