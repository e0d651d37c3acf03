use std::collections::HashMap;
use zcproto::{Call, CallError, Client, ConnectOptions};

async fn approve(call: Call) -> Result<bool, CallError> {
    let params: HashMap<String, String> = call.params()?;
    Ok(!params["text"].starts_with("rm"))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args().nth(1).unwrap_or("localhost:7443".into());
    let home = std::env::var("ZCPROTO_HOME").or(std::env::var("HOME").map(|home| home + "/.zeroclaw"))?;
    let key = std::fs::read_to_string("ada.key")?;
    let options = ConnectOptions::new(address).api_key("ada", key.trim()).ca_file(home + "/certs/ca.crt");
    let client = Client::connect(options).await?;
    client.handle("approve", approve).await?;
    for command in ["ls", "rm -r /"] {
        match client.call::<String>("shell.run", &HashMap::from([("command", command)])).await {
            Ok(output) => println!("{output}"),
            Err(error) => println!("{error}"),
        }
    }
    client.close().await;
    Ok(())
}
